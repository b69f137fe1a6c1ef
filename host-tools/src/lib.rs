//! The host side of Forebay: conversion, the command line, measuring.

pub mod arch;
pub mod boards;
pub mod convert;
pub mod gguf;
pub mod inspect;
pub mod quantize;
pub mod source;
pub mod temporary;
pub mod tokenizer;
