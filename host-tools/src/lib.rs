//! The host side of Forebay: conversion, the command line, measuring.

pub mod arch;
pub mod boards;
pub mod convert;
pub mod gguf;
pub mod inspect;
pub mod profile;
pub mod quantize;
pub mod settings;
pub mod simulate;
pub mod source;
<<<<<<< HEAD
pub mod temporary;
=======
pub mod synth;
>>>>>>> 3516f51 (forebay synth: models of random weights with known shapes; softmax routers: Mixtral, OLMoE, Qwen3-MoE; forebay flash-profile)
pub mod tokenizer;
pub mod trace;
