//! Flags that people know from other servers and that need nothing here.

use clap::Args;

/// Flags of other servers that people paste; accepted, and said to be without effect.
#[derive(Clone, Debug, Args)]
pub(crate) struct ForeignArgs {
    #[arg(long, hide = true)]
    pub tool_call_parser: Option<String>,
    #[arg(long, hide = true)]
    pub reasoning_parser: Option<String>,
    #[arg(long, hide = true)]
    pub enable_auto_tool_choice: bool,
    #[arg(long, hide = true)]
    pub enforce_eager: bool,
    #[arg(long, hide = true)]
    pub trust_remote_code: bool,
}

impl ForeignArgs {
    /// Says once which flags were taken and need nothing here.
    pub(crate) fn announce(&self) {
        let given = [
            ("--tool-call-parser", self.tool_call_parser.is_some()),
            ("--reasoning-parser", self.reasoning_parser.is_some()),
            ("--enable-auto-tool-choice", self.enable_auto_tool_choice),
            ("--enforce-eager", self.enforce_eager),
            ("--trust-remote-code", self.trust_remote_code),
        ];
        let names: Vec<_> = given.iter().filter(|(_, given)| *given).map(|(name, _)| *name).collect();
        if !names.is_empty() {
            eprintln!("phalanx: not needed here and without effect: {}", names.join(", "));
        }
    }
}
