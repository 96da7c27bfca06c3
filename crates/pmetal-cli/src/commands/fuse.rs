//! `pmetal fuse`.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use pmetal::core::ModelSource;
use pmetal::lora;

use super::infer::adapter_folder;
use crate::failure::WithHint;
use crate::output;

/// Arguments of `pmetal fuse`.
#[derive(Args)]
pub(crate) struct FuseArguments {
    /// Base model folder or GGUF file; without it, the one that the adapter names
    #[arg(long, value_name = "PATH")]
    model: Option<String>,
    /// Adapter folder, or a training run's folder
    #[arg(long, value_name = "DIR")]
    lora: PathBuf,
    /// Folder to write the merged model to; must not exist yet
    #[arg(long, value_name = "DIR")]
    output: PathBuf,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Merges and says where the model went.
pub(crate) fn run(arguments: FuseArguments) -> anyhow::Result<ExitCode> {
    let folder = adapter_folder(&arguments.lora)?;
    let named = match &arguments.model {
        Some(model) => Some(model.clone()),
        None => lora::base_model_of(&folder)?,
    };
    let named = named.ok_or_else(|| pmetal::Error::Usage("the adapter names no base model".to_owned()));
    let source = ModelSource::parse(&named.hint("give --model PATH")?);
    let report = lora::fuse::fuse(&source, &folder, &arguments.output)?;
    if arguments.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        println!(
            "merged {} of {} tensors into {} ({})",
            report.changed_tensors,
            report.tensors,
            arguments.output.display(),
            output::bytes(report.bytes as usize)
        );
    }
    Ok(ExitCode::SUCCESS)
}
