//! From decoded pieces to what is shown: stop strings across tokens, and thinking set apart.

const OPEN: &str = "<think>";
const CLOSE: &str = "</think>";

/// A piece of text with its kind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// The text.
    pub text: String,
    /// Whether it lies between `<think>` and `</think>`.
    pub thinking: bool,
}

/// Holds text back while it may still become a stop string or a marker.
#[derive(Debug, Clone)]
pub struct OutputFilter {
    stops: Vec<String>,
    held: String,
    thinking: bool,
    stopped: bool,
}

impl OutputFilter {
    /// A filter for a text that follows `prompt`, whose end may already have opened a thinking block.
    /// Empty stop strings are ignored.
    pub fn new(stops: &[String], prompt: &str) -> Self {
        Self {
            stops: stops.iter().filter(|stop| !stop.is_empty()).cloned().collect(),
            held: String::new(),
            thinking: prompt.trim_end().ends_with(OPEN),
            stopped: false,
        }
    }

    /// Whether a stop string has been met; later text is dropped.
    pub fn stopped(&self) -> bool {
        self.stopped
    }

    /// Takes more text and returns what can be shown by now.
    pub fn push(&mut self, text: &str) -> Vec<Piece> {
        self.held.push_str(text);
        let mut pieces = Vec::new();
        while !self.stopped {
            let marker = if self.thinking { CLOSE } else { OPEN };
            let stop = self.stops.iter().filter_map(|stop| self.held.find(stop.as_str())).min();
            let turn = self.held.find(marker);
            match (stop, turn) {
                (Some(stop), turn) if turn.is_none_or(|turn| stop <= turn) => {
                    self.emit(stop, &mut pieces);
                    self.held.clear();
                    self.stopped = true;
                }
                (_, Some(turn)) => {
                    self.emit(turn, &mut pieces);
                    self.held.drain(..marker.len());
                    self.thinking = !self.thinking;
                }
                (_, None) => {
                    let safe = self.held.len() - self.undecided(marker);
                    self.emit(safe, &mut pieces);
                    break;
                }
            }
        }
        pieces
    }

    /// The rest, once no more text comes.
    pub fn finish(mut self) -> Vec<Piece> {
        let mut pieces = Vec::new();
        if !self.stopped {
            let length = self.held.len();
            self.emit(length, &mut pieces);
        }
        pieces
    }

    fn emit(&mut self, length: usize, pieces: &mut Vec<Piece>) {
        if length > 0 {
            let text = self.held.drain(..length).collect();
            pieces.push(Piece { text, thinking: self.thinking });
        }
    }

    /// Length of the longest end of the held text that a stop string or the marker begins with.
    fn undecided(&self, marker: &str) -> usize {
        let starts = self.held.char_indices().map(|(index, _)| &self.held[index..]);
        let open =
            |end: &&str| marker.starts_with(end) || self.stops.iter().any(|stop| stop.starts_with(end));
        starts.into_iter().find(open).map_or(0, str::len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is shown of `text`, given one character at a time.
    fn shown(stops: &[&str], prompt: &str, text: &str) -> (String, String, bool) {
        let stops: Vec<String> = stops.iter().map(|stop| (*stop).to_owned()).collect();
        let mut filter = OutputFilter::new(&stops, prompt);
        let mut pieces = Vec::new();
        for character in text.chars() {
            pieces.extend(filter.push(&character.to_string()));
        }
        let stopped = filter.stopped();
        pieces.extend(filter.finish());
        let of =
            |thinking| pieces.iter().filter(|p| p.thinking == thinking).map(|p| p.text.as_str()).collect();
        (of(false), of(true), stopped)
    }

    #[test]
    fn stop_strings_are_met_across_pieces_and_not_shown() {
        assert_eq!(shown(&["\nUser:"], "", "hello\nUser: more"), ("hello".into(), String::new(), true));
        assert_eq!(shown(&["abc", "b"], "", "xxabc"), ("xxa".into(), String::new(), true));
    }

    #[test]
    fn an_almost_stop_string_is_shown_in_the_end() {
        assert_eq!(shown(&["\nUser:"], "", "hello\nUse"), ("hello\nUse".into(), String::new(), false));
        assert_eq!(shown(&["aab"], "", "aaab"), ("a".into(), String::new(), true));
    }

    #[test]
    fn thinking_is_set_apart() {
        let text = "<think>\nhm</think>\nYes <b> é";
        assert_eq!(shown(&[], "", text), ("\nYes <b> é".into(), "\nhm".into(), false));
        assert_eq!(shown(&[], "<|assistant|><think>\n", "hm</think>Yes"), ("Yes".into(), "hm".into(), false));
    }

    #[test]
    fn text_in_one_piece_gives_the_same() {
        let mut filter = OutputFilter::new(&["END".to_owned()], "");
        let pieces = filter.push("a<think>b</think>cENDd");
        let texts: Vec<_> = pieces.iter().map(|piece| (piece.text.as_str(), piece.thinking)).collect();
        assert_eq!(texts, [("a", false), ("b", true), ("c", false)]);
        assert!(filter.stopped() && filter.finish().is_empty());
    }
}
