pub mod kernel;

pub mod api;
pub mod calls;
