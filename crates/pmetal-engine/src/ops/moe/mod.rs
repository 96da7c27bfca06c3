//! Mixtures of experts: the choice of experts, their layers, and what joins their results.
//!
//! Letters besides those of the crate: k experts of a token, X experts, P = T k rows, one for each pair of a token and an
//! expert of its, ordered by expert and within an expert by token.

mod balance;
mod linear;
mod pair;
mod rows;

pub use balance::Balance;
pub use linear::{ExpertLinear, ExpertLora, expert_linear};
pub use pair::gated_pair;
pub use rows::{SumOptions, Weighting, combine, convert, gate_rows, gather};

use crate::device::{MOST_CHOICES, MOST_EXPERTS, Router, RoutingPlan};
use crate::error::{Error, Result, expect_dtype, expect_shape};
use crate::memory::Category;
use crate::{DType, Tape, Tensor, Var};

/// Which experts each token goes to, and what each weighs.
#[derive(Clone)]
pub struct Routing {
    /// f32 \[T, k\].
    pub weights: Var,
    plan: RoutingPlan,
}

impl Routing {
    /// P.
    pub fn rows(&self) -> usize {
        self.plan.rows()
    }

    /// u32 \[T, k\]: the experts of each token, the best first.
    pub fn chosen(&self) -> &Tensor {
        &self.plan.chosen
    }

    /// Where the pairs are.
    pub fn plan(&self) -> &RoutingPlan {
        &self.plan
    }
}

/// Chooses k experts for each token by logits \[T, X\] and weighs them, in f32. Gradients flow from the weights to the
/// logits; the choice has none.
///
/// `correction`, f32 \[X\], is added to the scores for the choice alone. Without it and without groups, logits are compared
/// rather than scores, which are in the same order. Of equals the first expert is chosen, and what is not a number counts as
/// the lowest. `balance` takes part in the layer's logits, see [`Balance`].
/// Bytes: the logits once, 16 P.
///
/// # Errors
/// [`Error::Shape`] or [`Error::DType`] when inputs do not fit; [`Error::Unsupported`] for a router that cannot choose;
/// out of memory.
pub fn route(
    tape: &Tape,
    logits: &Var,
    router: &Router,
    correction: Option<&Tensor>,
    balance: Option<&Balance>,
) -> Result<Routing> {
    let input = logits.tensor();
    let (tokens, experts) = (input.rows(), input.columns());
    expect_shape("route", "logits", input.shape(), &[tokens, experts])?;
    check_router(router, experts, input)?;
    if let Some(correction) = correction {
        expect_shape("route", "correction", correction.shape(), &[experts])?;
        expect_dtype("route", "correction", correction.dtype(), DType::F32)?;
    }
    if let Some(balance) = balance {
        balance.check(router, input)?;
    }
    let device = input.device().clone();
    let scratch = |dtype| Tensor::scratch(&device, Category::Activations, dtype, &[tokens, router.choices]);
    let (mut weights, mut chosen) = (scratch(DType::F32)?, scratch(DType::U32)?);
    let kernels = device.kernels().experts();
    kernels.choose_experts(input, router, correction, &mut weights, &mut chosen);
    let plan = kernels.plan_experts(chosen, experts)?;
    if let Some(balance) = balance.filter(|_| !tape.is_again()) {
        balance.add(input, &plan.chosen)?;
    }

    let (router, balance) = (*router, balance.cloned());
    let chosen = plan.chosen.clone();
    let wanted = logits.slot().is_some();
    let (saved, logit_slot) = (wanted.then(|| logits.save()), logits.slot());
    let weights = tape.push(weights, wanted, |slot| {
        Box::new(move |gradients| {
            let (Some(saved), Some(logit_slot)) = (saved, logit_slot) else { return Ok(()) };
            let d_weights = gradients.take(slot);
            if d_weights.is_none() && balance.is_none() {
                return Ok(());
            }
            let logits = saved.get()?;
            let mut d_logits =
                Tensor::scratch(logits.device(), Category::Activations, logits.dtype(), logits.shape())?;
            let kernels = logits.device().kernels().experts();
            let sums = balance.as_ref().map(Balance::sums);
            let slope = balance.as_ref().zip(sums.as_deref()).map(|(balance, sums)| balance.slope(sums));
            let d_weights = d_weights.as_ref();
            kernels.choose_experts_backward(&logits, &router, &chosen, d_weights, slope, &mut d_logits);
            gradients.add(logit_slot, d_logits)
        })
    });
    Ok(Routing { weights, plan })
}

fn check_router(router: &Router, experts: usize, input: &Tensor) -> Result<()> {
    let refuse = |reason: String| {
        Err(Error::Unsupported { operation: "route", device: input.device().name(), reason })
    };
    let choices = router.choices;
    if !input.dtype().is_float() {
        return refuse(format!("the logits are {}", input.dtype()));
    }
    if experts > MOST_EXPERTS || choices > MOST_CHOICES {
        let most = format!("more than {MOST_EXPERTS} experts or {MOST_CHOICES} choices");
        return refuse(format!("{choices} of {experts} experts are {most}"));
    }
    if choices == 0 || choices > experts {
        return refuse(format!("{choices} of {experts} experts cannot be chosen"));
    }
    let Some(groups) = router.groups else { return Ok(()) };
    let width = experts.checked_div(groups.count).unwrap_or(0);
    if width < 2 || width * groups.count != experts {
        return refuse(format!("{experts} experts are not {} groups of two or more", groups.count));
    }
    if groups.chosen > groups.count || groups.chosen * width < choices {
        let (chosen, count) = (groups.chosen, groups.count);
        return refuse(format!(
            "{choices} experts cannot be chosen from {chosen} of {count} groups of {width}"
        ));
    }
    Ok(())
}
