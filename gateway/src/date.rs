//! Today's date, for the system message.

use std::{
    fmt,
    str::FromStr,
    time::{SystemTime, UNIX_EPOCH},
};

/// Which date the model is told.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum CurrentDate {
    /// Today in UTC, as the model's own template has it.
    #[default]
    Today,
    /// None.
    None,
    /// Always this one, as `YYYY-MM-DD`, for reproducible runs.
    Fixed(String),
}

/// A text that is not a date policy.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("current date {0:?} is not `today`, `none` or a date as YYYY-MM-DD")]
pub struct CurrentDateError(String);

impl CurrentDate {
    /// The date at `now`, if there is one to tell.
    pub fn at(&self, now: SystemTime) -> Option<String> {
        match self {
            Self::Today => {
                let seconds = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
                let (year, month, day) = civil_date(seconds / 86_400);
                Some(format!("{year:04}-{month:02}-{day:02}"))
            }
            Self::None => None,
            Self::Fixed(date) => Some(date.clone()),
        }
    }
}

impl FromStr for CurrentDate {
    type Err = CurrentDateError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "today" => Ok(Self::Today),
            "none" => Ok(Self::None),
            date if is_date(date) => Ok(Self::Fixed(date.to_owned())),
            other => Err(CurrentDateError(other.to_owned())),
        }
    }
}

impl fmt::Display for CurrentDate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Today => "today",
            Self::None => "none",
            Self::Fixed(date) => date,
        })
    }
}

fn is_date(text: &str) -> bool {
    let parts: Vec<_> = text.split('-').collect();
    let [year, month, day] = parts.as_slice() else { return false };
    let number = |part: &str, digits: usize| {
        let plain = part.len() == digits && part.bytes().all(|byte| byte.is_ascii_digit());
        plain.then(|| part.parse::<u32>().ok()).flatten()
    };
    number(year, 4).is_some()
        && number(month, 2).is_some_and(|month| (1..=12).contains(&month))
        && number(day, 2).is_some_and(|day| (1..=31).contains(&day))
}

/// Year, month and day of a day counted from 1970-01-01. Source: Howard Hinnant, "chrono-Compatible Low-Level Date
/// Algorithms", `civil_from_days`, for days that are not negative.
fn civil_date(days: u64) -> (u64, u64, u64) {
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    // Years begin in March here, so that the leap day comes last.
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    (year_of_era + era * 400 + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn today_follows_the_calendar_over_leap_days_and_years() {
        let date = |seconds| CurrentDate::Today.at(UNIX_EPOCH + Duration::from_secs(seconds)).unwrap();
        // From `date -u -d @SECONDS +%F`.
        assert_eq!(date(0), "1970-01-01");
        assert_eq!(date(951_782_399), "2000-02-28");
        assert_eq!(date(951_782_400), "2000-02-29");
        assert_eq!(date(1_735_689_599), "2024-12-31");
        assert_eq!(date(1_772_323_200), "2026-03-01");
    }

    #[test]
    fn only_dates_are_fixed_dates() {
        assert_eq!("2026-03-07".parse(), Ok(CurrentDate::Fixed("2026-03-07".into())));
        for text in ["2026-13-01", "2026-1-1", "26-01-01", "+026-01-01", "tomorrow", ""] {
            assert!(text.parse::<CurrentDate>().is_err(), "{text}");
        }
    }
}
