//! 40 scenarios that each run one command on a machine of their own and find its disk clean: what
//! `shakedown bench suite` measures.

use shakedown::prelude::*;

fn leaves_a_mark(vm: &mut Vm) -> Result<()> {
    let found = vm.shell()?.run(
        "cmp -n 1048576 /dev/vda /dev/zero && test ! -e /root/mark && echo clean && \
                                 touch /root/mark && echo mark > /dev/vda",
    )?;
    ensure!(found.trimmed() == "clean", "somebody was here before: {}", found.text());
    Ok(())
}

macro_rules! scenarios {
    ($($name:ident)*) => {$(
        #[scenario(disks = ["16M"], timeout = "2m")]
        fn $name(vm: &mut Vm) -> Result<()> {
            leaves_a_mark(vm)
        }
    )*};
}

scenarios! {
    scenario_00 scenario_01 scenario_02 scenario_03 scenario_04 scenario_05 scenario_06 scenario_07 scenario_08 scenario_09
    scenario_10 scenario_11 scenario_12 scenario_13 scenario_14 scenario_15 scenario_16 scenario_17 scenario_18 scenario_19
    scenario_20 scenario_21 scenario_22 scenario_23 scenario_24 scenario_25 scenario_26 scenario_27 scenario_28 scenario_29
    scenario_30 scenario_31 scenario_32 scenario_33 scenario_34 scenario_35 scenario_36 scenario_37 scenario_38 scenario_39
}

shakedown::main!();
