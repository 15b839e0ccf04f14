//! A line being typed on a raw terminal: editing, history and completion, for the monitor.
//!
//! Keys are those of Emacs and of terminals that send what xterm sends (ECMA-48's CSI). What is drawn needs a terminal
//! that knows backspace and "erase to the end of the line"; lines are ASCII.

/// Longest line kept; the rest of a longer one is dropped.
const MAX_LINE: usize = 4096;
/// Most lines remembered.
const MAX_HISTORY: usize = 500;
/// Most completions listed.
const MAX_LISTED: usize = 60;

/// Where the last word of a line begins, and what it may go on with.
pub type Complete<'a> = &'a dyn Fn(&str) -> (usize, Vec<String>);

/// A line being typed.
#[derive(Debug, Default)]
pub struct LineEditor {
    line: Vec<u8>,
    /// Where the cursor is in it.
    at: usize,
    history: Vec<String>,
    /// The line of the history that is shown; the history's length: one's own.
    place: usize,
    /// One's own line, while another is shown.
    own: Vec<u8>,
    /// What came of an escape sequence.
    escape: Vec<u8>,
    /// The key before was Tab.
    tab: bool,
}

impl LineEditor {
    /// Takes a byte; what is to be drawn goes into `echo`; a finished line is returned. `prompt` is drawn again after a
    /// list of completions.
    pub fn feed(&mut self, byte: u8, echo: &mut Vec<u8>, prompt: &str, complete: Complete<'_>) -> Option<String> {
        if !self.escape.is_empty() {
            self.sequence(byte, echo);
            return None;
        }
        let again = std::mem::take(&mut self.tab);
        match byte {
            b'\r' | b'\n' => return Some(self.finish(echo)),
            0x1b => self.escape.push(byte),
            b'\t' => self.complete(echo, prompt, again, complete),
            // Ctrl-A (Ctrl-A Ctrl-A where Ctrl-A is mimus' own), Ctrl-E, Ctrl-B, Ctrl-F
            0x01 => self.go(0, echo),
            0x05 => self.go(self.line.len(), echo),
            0x02 => self.go(self.at.saturating_sub(1), echo),
            0x06 => self.go(self.at + 1, echo),
            0x10 => self.recall(-1, echo),
            0x0e => self.recall(1, echo),
            0x08 | 0x7f if self.at > 0 => {
                self.go(self.at - 1, echo);
                self.remove(self.at, self.at + 1, echo);
            }
            0x04 => self.remove(self.at, self.at + 1, echo),
            // Ctrl-K and Ctrl-U: to the end, to the begin. Ctrl-C: all.
            0x0b => self.remove(self.at, self.line.len(), echo),
            0x15 => self.remove_before(0, echo),
            0x03 => {
                self.go(self.line.len(), echo);
                self.remove_before(0, echo);
            }
            // Ctrl-W: the word before.
            0x17 => {
                let before = &self.line[..self.at];
                let end = before.iter().rposition(|b| *b != b' ').map_or(0, |i| i + 1);
                let from = before[..end].iter().rposition(|b| *b == b' ').map_or(0, |i| i + 1);
                self.remove_before(from, echo);
            }
            // Ctrl-L: draws it again.
            0x0c => {
                echo.extend(b"\r\n");
                self.draw(prompt, echo);
            }
            0x20..=0x7e => self.insert(&[byte], echo),
            _ => {}
        }
        None
    }

    fn finish(&mut self, echo: &mut Vec<u8>) -> String {
        echo.extend(b"\r\n");
        let line = String::from_utf8_lossy(&std::mem::take(&mut self.line)).into_owned();
        if !line.trim().is_empty() && self.history.last() != Some(&line) {
            self.history.push(line.clone());
        }
        if self.history.len() > MAX_HISTORY {
            self.history.remove(0);
        }
        (self.at, self.place) = (0, self.history.len());
        line
    }

    /// A byte of an escape sequence: `ESC [ … letter`, `ESC [ number ~`, `ESC O letter`.
    fn sequence(&mut self, byte: u8, echo: &mut Vec<u8>) {
        self.escape.push(byte);
        let end = match self.escape.as_slice() {
            [_, b'[' | b'O'] => return,
            [_, _] => true,
            _ => (0x40..=0x7e).contains(&byte) || self.escape.len() > 16,
        };
        if !end {
            return;
        }
        match std::mem::take(&mut self.escape).as_slice() {
            [_, _, b'A'] => self.recall(-1, echo),
            [_, _, b'B'] => self.recall(1, echo),
            [_, _, b'C'] => self.go(self.at + 1, echo),
            [_, _, b'D'] => self.go(self.at.saturating_sub(1), echo),
            [_, _, b'H'] | [_, b'[', b'1' | b'7', b'~'] => self.go(0, echo),
            [_, _, b'F'] | [_, b'[', b'4' | b'8', b'~'] => self.go(self.line.len(), echo),
            [_, b'[', b'3', b'~'] => self.remove(self.at, self.at + 1, echo),
            _ => {}
        }
    }

    /// Moves the cursor.
    fn go(&mut self, to: usize, echo: &mut Vec<u8>) {
        let to = to.min(self.line.len());
        match to.checked_sub(self.at) {
            // What is drawn again moves it right.
            Some(_) => echo.extend(&self.line[self.at..to]),
            None => echo.extend(std::iter::repeat_n(8, self.at - to)),
        }
        self.at = to;
    }

    fn insert(&mut self, text: &[u8], echo: &mut Vec<u8>) {
        let text = &text[..text.len().min(MAX_LINE - self.line.len().min(MAX_LINE))];
        let rest = self.line.split_off(self.at);
        self.line.extend(text);
        self.line.extend(&rest);
        echo.extend(text);
        self.at += text.len();
        echo.extend(&rest);
        echo.extend(std::iter::repeat_n(8, rest.len()));
    }

    /// Removes what is behind the cursor, up to `to`; the cursor is at `from`.
    fn remove(&mut self, from: usize, to: usize, echo: &mut Vec<u8>) {
        let to = to.min(self.line.len());
        if from >= to {
            return;
        }
        self.line.drain(from..to);
        let rest = &self.line[from..];
        echo.extend(rest);
        echo.extend(b"\x1b[K");
        echo.extend(std::iter::repeat_n(8, rest.len()));
    }

    fn remove_before(&mut self, from: usize, echo: &mut Vec<u8>) {
        let to = self.at;
        self.go(from, echo);
        self.remove(from, to, echo);
    }

    /// Shows an older or newer line.
    fn recall(&mut self, by: isize, echo: &mut Vec<u8>) {
        let Some(place) = self.place.checked_add_signed(by).filter(|p| *p <= self.history.len()) else { return };
        if self.place == self.history.len() {
            self.own = self.line.clone();
        }
        let wanted = self.history.get(place).map_or_else(|| self.own.clone(), |l| l.clone().into_bytes());
        self.place = place;
        self.go(self.line.len(), echo);
        self.remove_before(0, echo);
        self.insert(&wanted, echo);
    }

    fn draw(&self, prompt: &str, echo: &mut Vec<u8>) {
        echo.extend(prompt.bytes());
        echo.extend(&self.line);
        echo.extend(std::iter::repeat_n(8, self.line.len() - self.at));
    }

    /// Adds what all candidates have in common; lists them at the second Tab.
    fn complete(&mut self, echo: &mut Vec<u8>, prompt: &str, again: bool, complete: Complete<'_>) {
        let before = String::from_utf8_lossy(&self.line[..self.at]).into_owned();
        let (from, candidates) = complete(&before);
        let Some(word) = before.get(from..) else { return };
        let common = candidates.iter().skip(1).fold(candidates.first().map_or("", String::as_str), |common, c| {
            let same = common.bytes().zip(c.bytes()).take_while(|(a, b)| a == b).count();
            common.get(..same).unwrap_or("")
        });
        let added = common.strip_prefix(word).unwrap_or("").to_owned();
        if !added.is_empty() && added.is_ascii() {
            self.insert(added.as_bytes(), echo);
        }
        // A folder goes on.
        if candidates.len() == 1 && !common.ends_with('/') {
            self.insert(b" ", echo);
        } else if candidates.len() > 1 && again && added.is_empty() {
            echo.extend(b"\r\n");
            for candidate in candidates.iter().take(MAX_LISTED) {
                echo.extend(candidate.bytes());
                echo.extend(b"  ");
            }
            if candidates.len() > MAX_LISTED {
                echo.extend(b"...");
            }
            echo.extend(b"\r\n");
            self.draw(prompt, echo);
        }
        self.tab = true;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WORDS: [&str; 4] = ["info mem", "info mtree", "stop", "step"];

    fn complete(line: &str) -> (usize, Vec<String>) {
        (0, WORDS.iter().filter(|w| w.starts_with(line)).map(|w| (*w).to_owned()).collect())
    }

    /// The lines that come of some keys.
    fn lines(keys: &[u8]) -> Vec<String> {
        let (mut editor, mut echo) = (LineEditor::default(), Vec::new());
        keys.iter().filter_map(|b| editor.feed(*b, &mut echo, "> ", &complete)).collect()
    }

    /// What a terminal of one line shows of what is drawn.
    fn screen(keys: &[u8]) -> (String, usize) {
        let (mut editor, mut echo) = (LineEditor::default(), Vec::new());
        keys.iter().for_each(|b| _ = editor.feed(*b, &mut echo, "> ", &complete));
        let (mut row, mut at, mut i) = (Vec::new(), 0, 0);
        while i < echo.len() {
            match &echo[i..] {
                [0x1b, b'[', b'K', ..] => {
                    row.truncate(at);
                    i += 2;
                }
                [8, ..] => at -= 1,
                [b'\r', b'\n', ..] => {
                    (row, at) = (Vec::new(), 0);
                    i += 1;
                }
                [byte, ..] => {
                    row.resize(row.len().max(at + 1), b' ');
                    row[at] = *byte;
                    at += 1;
                }
                [] => {}
            }
            i += 1;
        }
        (String::from_utf8(row).unwrap().trim_end().to_owned(), at)
    }

    #[test]
    fn editing() {
        assert_eq!(lines(b"stpo\x7f\x7fop\rxx\x15c\n"), ["stop", "c"]);
        assert_eq!(lines(b"bcd\x01a\x05e\x1b[D\x1b[3~\x1b[Dx\r"), ["abcxd"], "home, end, left, delete");
        assert_eq!(lines(b"ab\x1bOHx\x1b[Fy\x1b[1~\x06z\x02\x04\r"), ["xaby"], "of other terminals");
        assert_eq!(lines(b"one two  three\x17\x17four\x0b\r"), ["one four"]);
        assert_eq!(lines(b"abc\x03d\x7f\x7f\x7fe\r"), ["e"]);
        assert_eq!(lines(b"a\x1b[5;2~b\x1bxc\r"), ["abc"], "what is not known");
        assert_eq!(lines(&[&[b'x'; 10_000][..], b"\r"].concat())[0].len(), MAX_LINE);
        assert_eq!(screen(b"helo\x1b[Dl\x1b[D\x1b[D"), ("hello".to_owned(), 2));
        assert_eq!(screen(b"abcdef\x1b[D\x1b[D\x0b"), ("abcd".to_owned(), 4));
        assert_eq!(screen(b"abcdef\x1b[D\x1b[D\x15"), ("ef".to_owned(), 0));
    }

    #[test]
    fn history() {
        assert_eq!(lines(b"one\rtwo\r\x1b[A\x1b[A\r"), ["one", "two", "one"]);
        assert_eq!(lines(b"one\rtwo\rown\x10\x10\x0e\x0e\r"), ["one", "two", "own"], "one's own comes back");
        assert_eq!(lines(b"\x1b[A\x1b[Bone\r\x1b[A\x1b[A\x1b[A\r\x1b[A2\r"), ["one", "one", "one2"]);
        assert_eq!(screen(b"a longer one\rx\r\x1b[A\x1b[A\x1b[B"), ("x".to_owned(), 1), "nothing is left of it");
    }

    #[test]
    fn completion() {
        assert_eq!(lines(b"i\te\t\r"), ["info mem "]);
        assert_eq!(lines(b"sto\t\rx\t\t\r"), ["stop ", "x"]);
        assert_eq!(screen(b"s\t\t\t"), ("> st".to_owned(), 4), "drawn again below the list");
        assert_eq!(screen(b"info m\x0c"), ("> info m".to_owned(), 8));
    }
}
