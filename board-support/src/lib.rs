//! What Forebay's boards share.
#![no_std]
