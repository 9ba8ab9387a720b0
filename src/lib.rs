//! Shakedown tests machines the way `cargo test` tests code: boot an image, drive it, record what
//! happened.
//!
//! A *scenario* is a function that is handed a running machine. In a test with `harness = false`:
//!
//! ```no_run
//! use shakedown::prelude::*;
//!
//! #[scenario(disks = ["1G"], timeout = "5m")]
//! fn a_file_system_survives_a_remount(vm: &mut Vm) -> Result<()> {
//!     let mut ssh = vm.ssh()?;
//!     ssh.run("mkfs.ext4 -q /dev/vda && mount /dev/vda /mnt && echo kept > /mnt/file")?;
//!     let read = ssh.run("umount /mnt && mount /dev/vda /mnt && cat /mnt/file")?;
//!     ensure!(read.trimmed() == "kept", "the file has {:?}", read.text());
//!     Ok(())
//! }
//!
//! shakedown::main!();
//! ```
//!
//! [`scenario`] lists what a scenario can say of itself and of its machine, [`vm::Vm`] what can be
//! done with the machine, [`harness`] how scenarios are selected and what the exit status means.
//! The README tells the rest to a user; what follows is for who works on the crate.
//!
//! # The house
//!
//! A floor uses those below it. From the top:
//!
//! | module | owns |
//! | --- | --- |
//! | `cli` (of the command, not of the library) | one thin file per subcommand of `shakedown` |
//! | `testflinger` (a feature) | Testflinger: its wire protocol, the client, the agent, machines as devices of queues, jobs, runs on many hosts |
//! | [`harness`] | registry, markers, deadlines and outcomes of scenarios, how long a run may take and how many machines run at once |
//! | [`storage`] | RAID and LVM layouts, cleanup plans, and the proof that nothing is left |
//! | [`vm`] | QEMU: accelerator, command line, QMP, the life of a machine, templates and forks |
//! | [`image`] | what is booted: recipes, prebuilt files, the content-addressed store |
//! | [`console`] | the serial console: transcript, login, commands |
//! | [`connection`] | commands and files over SSH, guest agent, console or on this host, by one trait |
//! | [`record`] | what a run leaves behind: evidence, metadata, ledger, events; settings of the environment |
//! | [`host`] | what this host has and lacks: tools, packages, firmware, memory, disk |
//! | [`process`] | children that do not outlive us, and the signals that end everything |
//! | [`deadline`] | one budget of time, handed down the call; every wait looks at it |
//! | [`fault`] | whose fault an error is: the machine's (`failed`) or ours and the host's (`error`) |
//!
//! The way of a scenario: `harness` selects it and opens its evidence in `record`, has `image`
//! find or build what it boots, waits for a slot, has `vm` find or make the template and fork it,
//! runs the body over a `connection`, collects the evidence, writes the outcome and the ledger line.
//!
//! Nothing here is async: threads block, each wait ends with its [`deadline::Deadline`], with
//! Ctrl-C, and with the machine that it waits for.
//!
//! # Features
//!
//! `cli`, on by default, is the `shakedown` command; `testflinger`, which it brings, is what the
//! command and other agents, devices and clients of Testflinger stand on. A project that brings scenarios needs none:
//! `default-features = false`.

pub mod connection;
pub mod console;
pub mod deadline;
pub mod fault;
pub mod harness;
pub mod host;
pub mod image;
#[doc(hidden)] // for the command
pub mod nearest;
pub mod process;
pub mod record;
pub mod storage;
#[cfg(feature = "testflinger")]
pub mod testflinger;
pub mod vm;

/// What the author of a scenario needs: `use shakedown::prelude::*;`
pub mod prelude {
    pub use crate::connection::{Cmd, Connection, Exit, Output};
    pub use crate::scenario;
    pub use crate::vm::Vm;
    pub use anyhow::{Context, Result, anyhow, bail, ensure};
    pub use std::time::Duration;
}

pub use shakedown_macros::scenario;

/// What the expansions of our macros name. Not for anyone else.
#[doc(hidden)]
pub mod __private {
    pub use crate::harness::{IntoResult, SCENARIOS, without_crate};
    pub use linkme;
}
