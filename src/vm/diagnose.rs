//! What is asked of a machine after a scenario, and on which channel.
//!
//! Owns the list of questions. Each is bounded in time, and none of them may hide the scenario's
//! own error: what cannot be collected is a note in the log.

use super::Vm;
use crate::connection::Cmd;
use crate::deadline::Deadline;
use std::time::Duration;

/// A question, and the label under which its answer is filed.
struct Question {
    label: &'static str,
    line: &'static str,
}

/// Asked after every scenario.
const ALWAYS: &[Question] = &[
    Question { label: "dmesg", line: "dmesg --color=never 2>&1 || dmesg 2>&1" },
    Question { label: "journal", line: "journalctl --no-pager -b 2>&1 || tail -n 2000 /var/log/syslog 2>&1" },
];

/// Asked when the outcome is not `passed`.
const ON_FAILURE: &[Question] = &[
    Question {
        label: "failed-units",
        line: "systemctl list-units --failed --no-pager --full --no-legend 2>&1",
    },
    Question { label: "jobs", line: "systemctl list-jobs --no-pager --no-legend 2>&1" },
    Question {
        label: "lsblk",
        line: "lsblk -f 2>&1; lsblk -o NAME,TYPE,SIZE,SERIAL,MOUNTPOINTS --paths 2>&1",
    },
    Question { label: "mdadm", line: "mdadm --detail --scan 2>&1; cat /proc/mdstat 2>&1" },
    Question { label: "lvm", line: "pvs 2>&1; vgs 2>&1; lvs 2>&1" },
    Question { label: "network", line: "ip addr show 2>&1; ip route show 2>&1; ip -s link show 2>&1" },
    Question { label: "processes", line: "ps axf -o pid,stat,etime,args 2>&1 || ps w 2>&1" },
];

/// One answer may take this long, on a machine that is in trouble under emulation.
const PER_QUESTION: Duration = Duration::from_secs(10);
/// All answers together: evidence must not become the run.
const IN_ALL: Duration = Duration::from_secs(45);

/// Of each answer, the last so many bytes: a machine that floods its journal does not flood us.
const LONGEST: u32 = 8 << 20;

/// Collects what the machine can still say.
///
/// A machine that is gone leaves its exit and standard error; one whose channels are dead leaves a
/// screenshot and the console's transcript.
pub(crate) fn collect(vm: &mut Vm, passed: bool) {
    let deadline = Deadline::after(IN_ALL, "collecting evidence");
    if !passed {
        vm.collect_host_side(&deadline);
    }
    let questions = ALWAYS.iter().chain(if passed { &[] } else { ON_FAILURE });
    for question in questions {
        if vm.ended() {
            return;
        }
        if deadline.expired() {
            vm.note(format!("no time left to collect `{}` and what follows", question.label));
            return;
        }
        let within = deadline.within(PER_QUESTION, "one question of the evidence");
        let line = format!("{{ {}; }} | tail -c {LONGEST}", question.line);
        match vm.ask(Cmd::new(line).allow_failure(), &within) {
            Some(Ok(output)) => vm.file(question.label, "txt", &output.stdout),
            Some(Err(error)) => vm.note(format!("cannot collect `{}`: {error}", question.label)),
            None => {
                vm.note("no connection to the machine: dmesg and journal cannot be collected");
                return;
            }
        }
    }
}
