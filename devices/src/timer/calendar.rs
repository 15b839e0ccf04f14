//! Days and dates of the proleptic Gregorian calendar, for clock chips.

/// A date and the time of day.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DateTime {
    /// Full year.
    pub year: i64,
    /// 1 to 12.
    pub month: i64,
    /// 1 to 31.
    pub day: i64,
    /// 0 to 23.
    pub hour: i64,
    /// 0 to 59.
    pub minute: i64,
    /// 0 to 59.
    pub second: i64,
}

/// Seconds of a day.
pub const DAY: i64 = 86_400;
/// Days from 0000-03-01 to 1970-01-01.
const EPOCH: i64 = 719_468;
/// Days of 400 years.
const ERA: i64 = 146_097;

impl DateTime {
    /// The date `seconds` after 1970-01-01 00:00.
    pub fn from_seconds(seconds: i64) -> Self {
        let (days, tod) = (seconds.div_euclid(DAY), seconds.rem_euclid(DAY));
        // Years that begin in March have their leap day at the end.
        let z = days + EPOCH;
        let (era, doe) = (z.div_euclid(ERA), z.rem_euclid(ERA));
        let yoe = (doe - doe / 1460 + doe / 36_524 - doe / 146_096) / 365;
        let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
        let from_march = (5 * doy + 2) / 153;
        let day = doy - (153 * from_march + 2) / 5 + 1;
        let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
        let year = yoe + era * 400 + i64::from(month <= 2);
        Self { year, month, day, hour: tod / 3600, minute: tod / 60 % 60, second: tod % 60 }
    }

    /// Seconds since 1970-01-01 00:00. Fields out of range carry over: month 13 is the next January.
    pub fn to_seconds(self) -> i64 {
        let months = self.month - 1;
        let year = self.year + months.div_euclid(12);
        let month = months.rem_euclid(12) + 1;
        let y = if month <= 2 { year - 1 } else { year };
        let (era, yoe) = (y.div_euclid(400), y.rem_euclid(400));
        let from_march = (month + 9) % 12;
        let doy = (153 * from_march + 2) / 5;
        let days = era * ERA + yoe * 365 + yoe / 4 - yoe / 100 + doy + self.day - 1 - EPOCH;
        days * DAY + self.hour * 3600 + self.minute * 60 + self.second
    }
}

/// Day of the week of a time in seconds since 1970: 0 is Sunday.
pub fn weekday(seconds: i64) -> i64 {
    (seconds.div_euclid(DAY) + 4).rem_euclid(7)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn date(year: i64, month: i64, day: i64) -> DateTime {
        DateTime { year, month, day, hour: 0, minute: 0, second: 0 }
    }

    #[test]
    fn known_days() {
        assert_eq!(date(1970, 1, 1).to_seconds(), 0);
        assert_eq!(date(2000, 3, 1).to_seconds(), 951_868_800);
        assert_eq!(weekday(0), 4, "a Thursday");
        assert_eq!(weekday(date(2024, 2, 29).to_seconds()), 4);
        assert_eq!(weekday(-1), 3);
        assert_eq!(date(1969, 13, 32), date(1969, 13, 32));
        assert_eq!(date(1969, 13, 32).to_seconds(), date(1970, 2, 1).to_seconds());
    }

    #[test]
    fn round_trips() {
        for days in (-800_000..3_000_000).step_by(97) {
            let t = days * DAY + days.rem_euclid(DAY);
            let d = DateTime::from_seconds(t);
            assert_eq!(d.to_seconds(), t);
            assert!((1..=12).contains(&d.month) && (1..=31).contains(&d.day), "{d:?}");
        }
    }
}
