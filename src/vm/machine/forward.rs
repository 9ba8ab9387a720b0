//! More ways to a machine's SSH than the port on 127.0.0.1 that each has.

use super::{SSH_PORT, Vm};
use crate::fault::Fault;
use anyhow::{Context, Result, ensure};
use std::net::SocketAddrV4;
use std::time::Duration;

/// QEMU answers at once.
const FORWARD: Duration = Duration::from_secs(10);

impl Vm {
    /// Forwards `from`, an address on loopback, to the machine's SSH. False where this host does not
    /// allow it: somebody listens there, or the port is for root.
    ///
    /// # Errors
    /// A host [`Fault`] when QEMU does not answer.
    pub fn forward_ssh(&mut self, from: SocketAddrV4) -> Result<bool> {
        ensure!(from.ip().is_loopback(), Fault::host(format!("{from} is not on loopback")));
        let deadline = self.deadline.within(FORWARD, "QEMU's forwarding of a port");
        let line = format!("hostfwd_add net0 tcp:{}:{}-:{SSH_PORT}", from.ip(), from.port());
        let said = self.qmp.monitor(&line, &deadline);
        // It says what went wrong, and nothing else.
        said.map(|text| text.trim().is_empty()).context(Fault::host("QEMU cannot forward a port"))
    }
}
