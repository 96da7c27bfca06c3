//! The learning rate as a pure function of the step, so that a resumed run needs no state.

/// How the rate falls after the warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decay {
    /// Not at all.
    Constant,
    /// Along a line.
    Linear,
    /// Along half a cosine wave.
    Cosine,
}

/// Learning rates of a run: a line up from zero, then a decay to `min_ratio` of the base rate.
///
/// Equal to the schedules `constant`, `constant_with_warmup`, `linear`, `cosine` and `cosine_with_min_lr` of
/// `transformers`. Its linear schedule always ends at zero; here a minimum holds for both decays. A constant rate has
/// no minimum.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Schedule {
    /// The shape after the warm-up.
    pub decay: Decay,
    /// The highest rate.
    pub base: f64,
    /// The rate at the end, as a fraction of `base`.
    pub min_ratio: f64,
    /// Steps of the line up.
    pub warmup_steps: u64,
    /// Optimizer steps of the whole run.
    pub total_steps: u64,
}

impl Schedule {
    /// The rate of the optimizer step number `step`, the first being 0; from `total_steps` on, the rate at the end.
    pub fn learning_rate(&self, step: u64) -> f64 {
        if step < self.warmup_steps {
            return self.base * (step as f64 / self.warmup_steps as f64);
        }
        let decay_steps = self.total_steps.saturating_sub(self.warmup_steps).max(1);
        let passed = (step - self.warmup_steps).min(decay_steps) as f64 / decay_steps as f64;
        let remaining = match self.decay {
            Decay::Constant => return self.base,
            Decay::Linear => 1.0 - passed,
            Decay::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * passed).cos()),
        };
        self.base * (remaining * (1.0 - self.min_ratio) + self.min_ratio)
    }
}

/// The number of warm-up steps that a ratio of the run means, rounded up like `transformers` does.
pub fn warmup_steps(ratio: f64, total_steps: u64) -> u64 {
    // A float-to-integer cast saturates, so no ratio can overflow.
    (ratio * total_steps as f64).ceil() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(serde::Deserialize)]
    struct Golden {
        cases: Vec<Case>,
    }

    #[derive(serde::Deserialize)]
    struct Case {
        name: String,
        base_lr: f64,
        steps: u64,
        warm_up_steps: u64,
        min_lr_ratio: f64,
        lr: Vec<f64>,
        lr_after_last_step: f64,
    }

    #[test]
    fn rates_equal_those_of_transformers_at_every_step() {
        let text = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/schedules.json"));
        let golden: Golden = serde_json::from_str(text).unwrap();
        assert!(golden.cases.len() >= 10);
        for case in golden.cases {
            let decay = match case.name.as_str() {
                "constant" | "constant_with_warmup" => Decay::Constant,
                "linear" => Decay::Linear,
                "cosine" | "cosine_with_min_lr" => Decay::Cosine,
                other => panic!("unknown schedule `{other}`"),
            };
            let schedule = Schedule {
                decay,
                base: case.base_lr,
                min_ratio: case.min_lr_ratio,
                warmup_steps: case.warm_up_steps,
                total_steps: case.steps,
            };
            assert_eq!(case.lr.len() as u64, case.steps);
            let expected = case.lr.iter().chain([&case.lr_after_last_step]);
            for (step, &expected) in expected.enumerate() {
                let found = schedule.learning_rate(step as u64);
                let error = (found - expected).abs();
                assert!(
                    error <= 1e-15 * case.base_lr.max(1e-3),
                    "{} step {step}: {found} {expected}",
                    case.name
                );
            }
        }
    }

    #[test]
    fn a_linear_decay_ends_at_its_minimum_and_stays_there() {
        let schedule =
            Schedule { decay: Decay::Linear, base: 1.0, min_ratio: 0.25, warmup_steps: 2, total_steps: 6 };
        let rates: Vec<f64> = (0..9).map(|step| schedule.learning_rate(step)).collect();
        assert_eq!(rates, [0.0, 0.5, 1.0, 0.8125, 0.625, 0.4375, 0.25, 0.25, 0.25]);
    }

    #[test]
    fn a_warm_up_longer_than_the_run_only_climbs() {
        let schedule =
            Schedule { decay: Decay::Cosine, base: 1.0, min_ratio: 0.0, warmup_steps: 8, total_steps: 4 };
        let rates: Vec<f64> = (0..5).map(|step| schedule.learning_rate(step)).collect();
        assert_eq!(rates, [0.0, 0.125, 0.25, 0.375, 0.5]);
    }

    #[test]
    fn warm_up_ratios_are_rounded_up() {
        assert_eq!([0, 1, 33, 34, 100].map(|total| warmup_steps(0.03, total)), [0, 1, 1, 2, 3]);
    }
}
