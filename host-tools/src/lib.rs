//! The host side of Forebay: conversion, the command line, measuring.
