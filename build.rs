//! One flag for the linker, which Cargo.toml has no place for.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    // The 40,000 relative relocations of the command in 1 KiB instead of 1 MiB, read at each start: an
    // agent is there for months. A linker that does not know it says so and goes on.
    println!("cargo:rustc-link-arg-bins=-Wl,-z,pack-relative-relocs");
}
