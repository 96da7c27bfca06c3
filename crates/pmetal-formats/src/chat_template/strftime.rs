//! The moment of rendering as text.

use std::fmt::Write;

const DAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];
const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];

struct Moment {
    year: i64,
    /// 1 to 12.
    month: usize,
    day: i64,
    /// 1 to 366.
    day_of_year: i64,
    /// 0 is Sunday.
    weekday: usize,
    hour: i64,
    minute: i64,
    second: i64,
}

/// Formats seconds since 1970 like C's `strftime` in the C locale; `%-d` leaves padding out.
///
/// Unknown directives stand for themselves, as in glibc.
pub(super) fn strftime(format: &str, unix_s: i64) -> String {
    // Four-digit years are all that a calendar needs; it also keeps the arithmetic in range.
    let moment = moment(unix_s.clamp(-62_135_596_800, 253_402_300_799));
    let mut out = String::new();
    let mut characters = format.chars();
    while let Some(character) = characters.next() {
        if character != '%' {
            out.push(character);
            continue;
        }
        let mut padding = None;
        let mut directive = characters.next();
        if let Some(flag @ ('-' | '_' | '0')) = directive {
            padding = Some(flag);
            directive = characters.next();
        }
        match directive {
            Some(directive) => print_directive(directive, padding, &moment, &mut out),
            None => out.push('%'),
        }
    }
    out
}

fn print_directive(directive: char, padding: Option<char>, moment: &Moment, out: &mut String) {
    let mut number = |value: i64, width: usize, default: char| match padding.unwrap_or(default) {
        '-' => {
            let _ = write!(out, "{value}");
        }
        '_' => {
            let _ = write!(out, "{value:>width$}");
        }
        _ => {
            let _ = write!(out, "{value:0>width$}");
        }
    };
    let hour12 = (moment.hour + 11) % 12 + 1;
    let month = i64::try_from(moment.month).unwrap_or(1);
    let weekday = i64::try_from(moment.weekday).unwrap_or(0);
    match directive {
        'd' => number(moment.day, 2, '0'),
        'e' => number(moment.day, 2, '_'),
        'm' => number(month, 2, '0'),
        'Y' => number(moment.year, 1, '0'),
        'y' => number(moment.year % 100, 2, '0'),
        'C' => number(moment.year / 100, 2, '0'),
        'H' => number(moment.hour, 2, '0'),
        'I' => number(hour12, 2, '0'),
        'k' => number(moment.hour, 2, '_'),
        'l' => number(hour12, 2, '_'),
        'M' => number(moment.minute, 2, '0'),
        'S' => number(moment.second, 2, '0'),
        'f' => number(0, 6, '0'),
        'j' => number(moment.day_of_year, 3, '0'),
        'w' => number(weekday, 1, '0'),
        'u' => number((weekday + 6) % 7 + 1, 1, '0'),
        'U' => number((moment.day_of_year + 6 - weekday) / 7, 2, '0'),
        'W' => number((moment.day_of_year + 6 - (weekday + 6) % 7) / 7, 2, '0'),
        'a' => out.push_str(&DAYS[moment.weekday][..3]),
        'A' => out.push_str(DAYS[moment.weekday]),
        'b' | 'h' => out.push_str(&MONTHS[moment.month - 1][..3]),
        'B' => out.push_str(MONTHS[moment.month - 1]),
        'p' => out.push_str(if moment.hour < 12 { "AM" } else { "PM" }),
        'n' => out.push('\n'),
        't' => out.push('\t'),
        '%' => out.push('%'),
        // Python prints nothing for the zone of a time without one.
        'z' | 'Z' => {}
        'D' | 'x' => print_all("m/d/y", moment, out),
        'F' => print_all("Y-m-d", moment, out),
        'T' | 'X' => print_all("H:M:S", moment, out),
        'R' => print_all("H:M", moment, out),
        'r' => print_all("I:M:S p", moment, out),
        'c' => print_all("a b e H:M:S Y", moment, out),
        other => {
            out.push('%');
            out.extend(padding);
            out.push(other);
        }
    }
}

/// Prints a layout in which every letter is a directive.
fn print_all(layout: &str, moment: &Moment, out: &mut String) {
    for letter in layout.chars() {
        if letter.is_ascii_alphabetic() {
            print_directive(letter, None, moment, out);
        } else {
            out.push(letter);
        }
    }
}

fn moment(unix_s: i64) -> Moment {
    let days = unix_s.div_euclid(86_400);
    let second_of_day = unix_s.rem_euclid(86_400);
    // Counting from 1 March of year 0 puts the leap day at the end of a year (Howard Hinnant, "chrono-compatible
    // low-level date algorithms").
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let day_of_era = shifted.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_shifted_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_shifted_year + 2) / 153;
    let day = day_of_shifted_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    let day_of_year =
        if month > 2 { day_of_shifted_year + 60 + i64::from(leap) } else { day_of_shifted_year - 305 };
    Moment {
        year,
        month: usize::try_from(month).unwrap_or(1),
        day,
        day_of_year,
        weekday: usize::try_from((days + 4).rem_euclid(7)).unwrap_or(0),
        hour: second_of_day / 3_600,
        minute: second_of_day / 60 % 60,
        second: second_of_day % 60,
    }
}
