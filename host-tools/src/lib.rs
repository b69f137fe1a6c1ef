//! The host side of Forebay: conversion, the command line, measuring.

pub mod arch;
pub mod boards;
pub mod convert;
pub mod gguf;
pub mod inspect;
pub mod moments;
pub mod neurons;
pub mod planner;
pub mod profile;
pub mod quantize;
pub mod settings;
pub mod simulate;
pub mod source;
pub mod synth;
pub mod template;
pub mod temporary;
pub mod tokenizer;
pub mod trace;
