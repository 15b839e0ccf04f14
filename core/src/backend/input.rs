//! What a person does: keys, buttons, movement. Displays and monitors send it, keyboards and mice take it.

/// A key, by its number in Linux's input event codes (`KEY_*`), which name positions, not letters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Key(pub u16);

/// A button of a mouse.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MouseButton {
    /// Left.
    Left,
    /// Right.
    Right,
    /// Middle: the wheel.
    Middle,
    /// First side button.
    Side,
    /// Second side button.
    Extra,
}

/// One thing that happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum InputEvent {
    /// A key went down, also again while it is held, or up.
    Key {
        /// Which.
        key: Key,
        /// Down.
        down: bool,
    },
    /// A button went down or up.
    Button {
        /// Which.
        button: MouseButton,
        /// Down.
        down: bool,
    },
    /// Movement, in counts: right and down are positive.
    Motion {
        /// To the right.
        dx: i32,
        /// Down.
        dy: i32,
    },
    /// The wheel, in notches: away from the person is positive.
    Wheel {
        /// Notches.
        clicks: i32,
    },
}

/// Takes input. Any thread, no lock held; what the device has no room for is lost.
pub trait InputSink: Send + Sync {
    /// Takes what happened at one time.
    fn input(&self, events: &[InputEvent]);
}
