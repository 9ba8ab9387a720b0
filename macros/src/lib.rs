//! The `#[scenario]` attribute.
//!
//! Owns the syntax of the attribute and turns it into constant data in a linker section. What the
//! data means is the business of the `shakedown` crate, whose paths the expansion names.

mod args;
mod expand;
mod value;

/// Registers a function as a scenario.
///
/// ```text
/// #[scenario(markers = [slow], disks = ["4G", "1536M"], firmware = Uefi, timeout = "3m")]
/// fn extra_disks_are_blank(vm: &mut Vm) -> Result<()> { ... }
///
/// #[scenario]
/// fn the_tool_explains_itself() -> Result<()> { ... }
/// ```
///
/// A function with a parameter gets a machine and carries the marker `vm`; one without runs on this
/// host alone. It returns `()` or a `Result<(), E>` whose error converts into `anyhow::Error`.
/// The scenario's name is the path of the function without the crate's name.
///
/// | key | value | default |
/// | --- | --- | --- |
/// | `markers` | `[slow, nightly]`: labels to select by, known to the settings | none |
/// | `ignore` | `"reason"`: not run unless `--ignored` or `--include-ignored` asks for it | |
/// | `timeout` | `"90s"`, `"3m"`, `"1h"`, `"1500ms"`: for boot and body together | ten minutes |
/// | `name` | `"last part of the name"` | the function's name |
/// | `image` | `"name"` of an image in the settings | the project's default image |
/// | `boot` | `fork` of a booted machine, or `cold` | `fork` |
/// | `medium` | `kernel`, `cdrom` or `disk`: what the image is presented as | `kernel` |
/// | `firmware` | `bios` or `uefi` | `bios` |
/// | `disks` | `["4G", nvme("1536M"), ahci("1G")]`: blank disks, in order | none |
/// | `memory` | `"2G"`, whole MiB | `"1G"` |
/// | `cpus` | a number | `2` |
/// | `hostname` | `"node-1"`: the machine's name, instead of its image's | |
/// | `fresh_machine_id` | stands alone: a machine id of its own, instead of its image's or its template's | |
/// | `reboots` | stands alone: the machine may restart; any other that does has failed | |
///
/// Sizes are binary: `K`, `M`, `G`, `T` are powers of 1024. Words may be written as Rust variants
/// are: `Uefi` is `uefi`. The keys from `image` on describe a machine and need the parameter.
#[proc_macro_attribute]
pub fn scenario(
    arguments: proc_macro::TokenStream,
    item: proc_macro::TokenStream,
) -> proc_macro::TokenStream {
    let item: proc_macro2::TokenStream = item.into();
    match expand::scenario(arguments.into(), item.clone()) {
        Ok(tokens) => tokens.into(),
        Err(error) => {
            // The function stays, so that one mistake does not become "cannot find function" too.
            let mut tokens = error.to_compile_error();
            tokens.extend(item);
            tokens.into()
        }
    }
}
