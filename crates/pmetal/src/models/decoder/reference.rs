//! The loss of a model whose layers are never in memory together.

use super::*;
use crate::models::TokenRun;

impl Decoder {
    /// The mean loss of a run, over trained tokens, with other layers than the decoder's own: `layer` makes each when it
    /// is needed, and it is dropped after its use.
    ///
    /// # Errors
    /// As [`Self::loss`]; what `layer` returns.
    pub(in crate::models) fn loss_through(
        &self,
        run: &TokenRun,
        labels: &[i32],
        mut layer: impl FnMut(usize) -> Result<Layer>,
    ) -> Result<f64> {
        let tape = Tape::off();
        let shared = Shared {
            inputs: Arc::new(self.inputs(run, run.ids.len(), None)?),
            residual_scale: self.spec.residual_scale,
            dropout: None,
            balance: None,
        };
        let mut states = self.embed(&tape, &shared.inputs)?;
        for index in 0..self.layers.len() {
            states = layer(index)?.run(&tape, states, &shared, None)?;
        }
        let states = self.final_norm.apply(&tape, &states, Spare::default())?;
        let parameters = self.loss_parameters(1.0);
        let targets = self.targets(labels, run.ids.len())?;
        let loss = linear_cross_entropy(&tape, &states, self.head(), &targets, &parameters)?;
        Ok(loss.sum.read()? / loss.tokens.max(1) as f64)
    }

    /// The mean loss of a run, over trained tokens.
    ///
    /// # Errors
    /// As [`Self::loss`].
    pub(in crate::models) fn mean_loss(&self, run: &TokenRun, labels: &[i32]) -> Result<f64> {
        let (_, loss) = self.loss(&Tape::off(), run, labels, 1.0, Forward::default())?;
        Ok(loss.sum.read()? / loss.tokens.max(1) as f64)
    }
}
