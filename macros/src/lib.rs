//! The `#[scenario]` attribute.
