//! The host side of Forebay: conversion, the command line, measuring.

pub mod arch;
pub mod convert;
pub mod gguf;
pub mod inspect;
pub mod quantize;
pub mod source;
pub mod tokenizer;
