//! How a run ended, as an exit status that differs for each kind of failure.

use core::fmt::{Debug, Display};

use forebay_runtime::engine::{EngineError, ReadFault};
use forebay_runtime::open::OpenError;
use forebay_runtime::plan::PlanError;
use forebay_storage::image::ImageError;
use forebay_storage::store::ReadError;

use crate::app::AppError;

/// An exit status. A panic's is 101.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Status {
    /// The tokens were generated.
    Done = 0,
    /// A failure of no kind below.
    Failed = 1,
    /// The command line asks for something that cannot be.
    Usage = 2,
    /// There is no disk, no card in the slot, or no partition for an image.
    NoDisk = 3,
    /// The disk reported errors.
    Device = 4,
    /// The disk stopped answering.
    NoAnswer = 5,
    /// What is on the disk is not an image.
    NoImage = 6,
    /// The image has a version that this program does not read.
    Version = 7,
    /// The disk, or its partition, ends before the image does.
    Short = 8,
    /// The image's bytes do not have their checksums, or contradict each other.
    Damaged = 9,
    /// The memory is smaller than the least plan.
    Memory = 10,
}

/// An error that has an exit status.
pub trait HasStatus: Display {
    /// The exit status.
    fn status(&self) -> Status;
}

impl<E: Debug + Display> HasStatus for AppError<E> {
    fn status(&self) -> Status {
        match self {
            Self::Open(error) => of_open(error),
            Self::Plan(PlanError::TooSmall { .. }) | Self::Arena(_) => Status::Memory,
            Self::Engine(error) => of_engine(error),
            Self::Plan(PlanError::Context { .. } | PlanError::Zero(_))
            | Self::NoTokenizer
            | Self::EmptyPrompt
            | Self::Context { .. }
            | Self::Backend
            | Self::Cores { .. } => Status::Usage,
            Self::Tokenizer(_) | Self::Turns(_) => Status::Damaged,
            Self::Plan(_) => Status::Failed,
        }
    }
}

fn of_open<E: Debug + Display>(error: &OpenError<E>) -> Status {
    match error {
        OpenError::Image(ImageError::NotAnImage { .. }) => Status::NoImage,
        OpenError::Image(ImageError::Version { .. }) => Status::Version,
        // The superblock is whole, and its image is longer than what there is to read.
        OpenError::Image(ImageError::TooShort { .. }) => Status::Short,
        OpenError::Image(_) | OpenError::Model(_) | OpenError::MissingSection(_) | OpenError::Extent { .. } => {
            Status::Damaged
        }
        OpenError::Read { error, .. } => match error {
            ReadError::Device(_) => Status::Device,
            ReadError::Short { .. } => Status::Short,
            ReadError::Gone => Status::NoAnswer,
            _ => Status::Failed,
        },
        OpenError::Arena(_) => Status::Memory,
        _ => Status::Failed,
    }
}

fn of_engine(error: &EngineError) -> Status {
    match error {
        EngineError::Arena(_) => Status::Memory,
        EngineError::Read { fault, .. } => match fault {
            ReadFault::Device => Status::Device,
            ReadFault::Short => Status::Short,
            ReadFault::Gone => Status::NoAnswer,
            ReadFault::Checksum => Status::Damaged,
            _ => Status::Failed,
        },
        EngineError::NoAnswer { .. } => Status::NoAnswer,
        EngineError::Token { .. } | EngineError::ContextFull { .. } => Status::Usage,
        EngineError::NonFinite { .. } => Status::Damaged,
        _ => Status::Failed,
    }
}
