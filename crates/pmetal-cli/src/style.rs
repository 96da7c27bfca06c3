//! Colour on terminals that want it.

use std::io::IsTerminal;

/// Whether talk on stderr may be coloured: it is a terminal and `NO_COLOR` is not set.
pub(crate) fn colours() -> bool {
    std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

fn wrap(code: &str, text: &str) -> String {
    if colours() { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
}

/// Bold, for headings.
pub(crate) fn bold(text: &str) -> String {
    wrap("1", text)
}

/// Faint, for what matters less.
pub(crate) fn faint(text: &str) -> String {
    wrap("2", text)
}

/// Red, for errors.
pub(crate) fn red(text: &str) -> String {
    wrap("1;31", text)
}

/// Yellow, for warnings.
pub(crate) fn yellow(text: &str) -> String {
    wrap("33", text)
}

/// Green, for commands and success.
pub(crate) fn green(text: &str) -> String {
    wrap("32", text)
}

/// Cyan, for paths and hints.
pub(crate) fn cyan(text: &str) -> String {
    wrap("36", text)
}

fn wrap_out(code: &str, text: &str) -> String {
    let wanted =
        std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    if wanted { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
}

/// Green on stdout.
pub(crate) fn green_out(text: &str) -> String {
    wrap_out("32", text)
}

/// Red on stdout.
pub(crate) fn red_out(text: &str) -> String {
    wrap_out("1;31", text)
}

/// Faint on stdout.
pub(crate) fn faint_out(text: &str) -> String {
    wrap_out("2", text)
}
