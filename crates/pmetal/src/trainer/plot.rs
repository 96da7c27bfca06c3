//! `loss.svg`: the losses of a run as a picture that needs no program but a browser.

use std::fmt::Write as _;

use crate::trainer::metrics::Record;

const WIDTH: f64 = 860.0;
const HEIGHT: f64 = 480.0;
const LEFT: f64 = 74.0;
const RIGHT: f64 = 24.0;
const TOP: f64 = 56.0;
const BOTTOM: f64 = 54.0;
/// More points than this cannot be told apart at the width of the picture.
const MOST_POINTS: usize = 2000;
/// The smoothed line remembers about this fraction of the run.
const SMOOTHING: f64 = 0.04;

// Colours with enough contrast on white and on black alike; the page's background shows through.
const STYLE: &str = "<style>\
text{font:13px system-ui,sans-serif;fill:#6b7480}.title{font-size:16px;font-weight:600}\
.grid{stroke:#8a94a3;stroke-opacity:.28}.axis{stroke:#8a94a3}\
.train{fill:#4a8fe0;fill-opacity:.45}.smooth{fill:none;stroke:#2f7de1;stroke-width:2.2;stroke-linejoin:round}\
.eval{fill:#e8710a}.evals{fill:none;stroke:#e8710a;stroke-width:1.4;stroke-dasharray:5 4}\
@media(prefers-color-scheme:dark){text{fill:#aeb6c2}}</style>";

/// Draws training and evaluation losses over steps. Losses that are not finite are left out.
pub fn loss_svg(records: &[Record], title: &str) -> String {
    let finite = |&(_, loss): &(f64, f64)| loss.is_finite();
    let pick = |select: fn(&Record) -> Option<(f64, f64)>| -> Vec<(f64, f64)> {
        records.iter().filter_map(select).filter(finite).collect()
    };
    let train = pick(|record| match record {
        Record::Step(step) => Some((step.step as f64, step.loss)),
        _ => None,
    });
    let eval = pick(|record| match record {
        Record::Eval(eval) => Some((eval.step as f64, eval.eval_loss)),
        _ => None,
    });
    let axes = Axes::around(train.iter().chain(&eval));
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" \
         aria-label=\"Loss over steps\">\n{STYLE}\n<text class=\"title\" x=\"{LEFT}\" y=\"28\">{}</text>\n",
        escape(title)
    );
    axes.draw(&mut svg);
    if train.is_empty() && eval.is_empty() {
        text(&mut svg, WIDTH / 2.0, HEIGHT / 2.0, "middle", "no losses were reported");
    }
    let radius = if train.len() > 200 { 1.7 } else { 2.6 };
    for point in thinned(&train) {
        axes.dot(&mut svg, "train", point, radius);
    }
    axes.line(&mut svg, "smooth", &thinned(&smoothed(&train)));
    axes.line(&mut svg, "evals", &eval);
    for &point in &eval {
        axes.dot(&mut svg, "eval", point, 4.0);
    }
    legend(&mut svg, !train.is_empty(), !eval.is_empty());
    svg.push_str("</svg>\n");
    svg
}

/// The ranges of both axes, each beginning and ending at a tick.
struct Axes {
    x_ticks: Vec<f64>,
    y_ticks: Vec<f64>,
}

impl Axes {
    fn around<'a>(points: impl Iterator<Item = &'a (f64, f64)>) -> Self {
        let (mut last_step, mut low, mut high) = (1.0_f64, f64::INFINITY, f64::NEG_INFINITY);
        for &(step, loss) in points {
            (last_step, low, high) = (last_step.max(step), low.min(loss), high.max(loss));
        }
        if low > high {
            (low, high) = (0.0, 1.0);
        }
        Self { x_ticks: ticks(0.0, last_step, 8.0), y_ticks: ticks(low, high, 6.0) }
    }

    fn x(&self, step: f64) -> f64 {
        let (first, last) = ends(&self.x_ticks);
        LEFT + (step - first) / (last - first) * (WIDTH - LEFT - RIGHT)
    }

    fn y(&self, loss: f64) -> f64 {
        let (first, last) = ends(&self.y_ticks);
        HEIGHT - BOTTOM - (loss - first) / (last - first) * (HEIGHT - TOP - BOTTOM)
    }

    fn draw(&self, svg: &mut String) {
        let (right, bottom) = (WIDTH - RIGHT, HEIGHT - BOTTOM);
        for &tick in &self.y_ticks {
            let y = self.y(tick);
            segment(svg, "grid", (LEFT, y), (right, y));
            text(svg, LEFT - 9.0, y + 4.5, "end", &label(tick, &self.y_ticks));
        }
        for &tick in &self.x_ticks {
            let x = self.x(tick);
            segment(svg, "axis", (x, bottom), (x, bottom + 5.0));
            text(svg, x, bottom + 21.0, "middle", &label(tick, &self.x_ticks));
        }
        segment(svg, "axis", (LEFT, bottom), (right, bottom));
        text(svg, (LEFT + right) / 2.0, HEIGHT - 10.0, "middle", "step");
        let middle = (TOP + bottom) / 2.0;
        let turned =
            format!("<text transform=\"translate(18 {middle}) rotate(-90)\" text-anchor=\"middle\">");
        svg.push_str(&format!("{turned}loss per trained token</text>\n"));
    }

    fn dot(&self, svg: &mut String, class: &str, (step, loss): (f64, f64), radius: f64) {
        let (x, y) = (self.x(step), self.y(loss));
        writeln!(svg, "<circle class=\"{class}\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"{radius}\"/>").ok();
    }

    fn line(&self, svg: &mut String, class: &str, points: &[(f64, f64)]) {
        if points.len() < 2 {
            return;
        }
        write!(svg, "<polyline class=\"{class}\" points=\"").ok();
        for &(step, loss) in points {
            write!(svg, "{:.1},{:.1} ", self.x(step), self.y(loss)).ok();
        }
        svg.push_str("\"/>\n");
    }
}

fn ends(ticks: &[f64]) -> (f64, f64) {
    (ticks[0], ticks[ticks.len() - 1])
}

/// About `wanted` round numbers from at most `low` to at least `high`.
fn ticks(low: f64, high: f64, wanted: f64) -> Vec<f64> {
    // Losses that are all the same still need a range to be drawn in.
    let span = (high - low).max(low.abs() * 1e-3).max(1e-6);
    let power = 10_f64.powf((span / wanted).log10().floor());
    let step =
        [1.0, 2.0, 5.0, 10.0].map(|factor| factor * power).into_iter().find(|step| span / step <= wanted);
    let step = step.unwrap_or(10.0 * power);
    let first = (low / step).floor();
    let count = ((high / step).ceil() - first).max(1.0) as usize;
    (0..=count).map(|index| (first + index as f64) * step).collect()
}

/// A tick with as many digits as the distance of ticks needs.
fn label(tick: f64, ticks: &[f64]) -> String {
    let digits = (-(ticks[1] - ticks[0]).log10()).ceil().clamp(0.0, 9.0) as usize;
    format!("{tick:.digits$}")
}

/// An exponential mean from both sides, so that the line does not lag behind a falling loss.
fn smoothed(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let keep = 1.0 - 1.0 / (points.len() as f64 * SMOOTHING).max(1.5);
    let before = decaying_sums(points.iter().map(|point| point.1), keep);
    let mut after = decaying_sums(points.iter().rev().map(|point| point.1), keep);
    after.reverse();
    let sums = before.into_iter().zip(after);
    points
        .iter()
        .zip(sums)
        .map(|(&(step, _), (left, right))| (step, (left.0 + right.0) / (left.1 + right.1)))
        .collect()
}

/// Sums in which older values count less and less, with the sums of what they count.
fn decaying_sums(values: impl Iterator<Item = f64>, keep: f64) -> Vec<(f64, f64)> {
    let next = |(sum, weight): &mut (f64, f64), value: f64| {
        (*sum, *weight) = (keep * *sum + value, keep * *weight + 1.0);
        Some((*sum, *weight))
    };
    values.scan((0.0, 0.0), next).collect()
}

/// Every n-th point, so that the picture of a long run stays small.
fn thinned(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    points.iter().copied().step_by(points.len().div_ceil(MOST_POINTS).max(1)).collect()
}

fn legend(svg: &mut String, has_train: bool, has_eval: bool) {
    let (train_x, eval_x, y) = (WIDTH - RIGHT - 280.0, WIDTH - RIGHT - 88.0, TOP - 28.0);
    if has_train {
        segment(svg, "smooth", (train_x - 20.0, y - 4.5), (train_x, y - 4.5));
        text(svg, train_x + 8.0, y, "start", "training, smoothed");
    }
    if has_eval {
        writeln!(svg, "<circle class=\"eval\" cx=\"{eval_x}\" cy=\"{:.1}\" r=\"4\"/>", y - 4.5).ok();
        text(svg, eval_x + 10.0, y, "start", "evaluation");
    }
}

fn segment(svg: &mut String, class: &str, (x1, y1): (f64, f64), (x2, y2): (f64, f64)) {
    let line = format!("x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\"");
    writeln!(svg, "<line class=\"{class}\" {line}/>").ok();
}

fn text(svg: &mut String, x: f64, y: f64, anchor: &str, content: &str) {
    writeln!(svg, "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{content}</text>").ok();
}

fn escape(text: &str) -> String {
    let visible = text.chars().filter(|character| !character.is_control());
    visible.fold(String::new(), |mut escaped, character| {
        match character {
            '<' => escaped.push_str("&lt;"),
            '&' => escaped.push_str("&amp;"),
            other => escaped.push(other),
        }
        escaped
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trainer::metrics::{EvalRecord, StepRecord};

    fn step(step: u64, loss: f64) -> Record {
        let zero = 0.0;
        Record::Step(StepRecord {
            step,
            loss,
            lr: zero,
            balance_loss: None,
            grad_norm: zero,
            tokens_per_second: zero,
            trained_tokens: 0,
            tokens: 0,
            peak_bytes: 0,
            elapsed_s: zero,
        })
    }

    #[test]
    fn ticks_are_round_and_cover_the_range() {
        assert_eq!(ticks(0.0, 100.0, 8.0), [0.0, 20.0, 40.0, 60.0, 80.0, 100.0]);
        assert_eq!(ticks(0.0, 1.0, 8.0).len(), 6);
        let found = ticks(1.31, 3.74, 6.0);
        assert_eq!(found, [1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0]);
        assert_eq!(label(found[1], &found), "1.5");
        for (low, high) in [(2.0, 2.0), (0.0, 0.0), (-1.0, 1e9), (1e-9, 2e-9)] {
            let found = ticks(low, high, 6.0);
            assert!(found[0] <= low && *found.last().unwrap() >= high && found.len() <= 9, "{found:?}");
            assert!(found.windows(2).all(|pair| pair[0] < pair[1]), "{found:?}");
        }
    }

    #[test]
    fn the_picture_holds_each_loss_at_its_place() {
        let records = [
            step(1, 4.0),
            step(2, 2.0),
            step(3, f64::NAN),
            Record::Eval(EvalRecord { step: 2, eval_loss: 3.0 }),
        ];
        let svg = loss_svg(&records, "a < b & c\n");
        assert_eq!(svg.matches("class=\"train\"").count(), 2);
        assert!(svg.contains("a &lt; b &amp; c</text>"));
        assert!(!svg.contains("NaN") && !svg.contains("inf"));
        let axes = Axes::around([(1.0, 4.0), (2.0, 2.0)].iter());
        let place = format!("cx=\"{:.1}\" cy=\"{:.1}\" r=\"4\"", axes.x(2.0), axes.y(3.0));
        assert!(svg.contains(&place), "{place} in {svg}");
        assert!(axes.y(4.0) < axes.y(2.0), "a higher loss is drawn higher");
    }

    #[test]
    fn a_run_without_losses_says_so() {
        assert!(loss_svg(&[], "x").contains("no losses were reported"));
    }

    #[test]
    fn smoothing_keeps_a_constant_and_does_not_lag_behind_a_line() {
        let points: Vec<(f64, f64)> = (0..500).map(|step| (step as f64, 3.0)).collect();
        assert!(smoothed(&points).iter().all(|point| (point.1 - 3.0).abs() < 1e-12));
        let falling: Vec<(f64, f64)> = (0..500).map(|step| (step as f64, -f64::from(step))).collect();
        let middle = smoothed(&falling)[250];
        assert!((middle.1 + 250.0).abs() < 1e-3, "{middle:?}");
        assert!(thinned(&points).len() == 500 && thinned(&vec![(0.0, 0.0); 9999]).len() <= MOST_POINTS);
    }
}
