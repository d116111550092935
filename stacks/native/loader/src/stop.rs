//! One flag that ends everything: threads look at it, and waits on the network race against it.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::error::{Error, Kind, Result};

/// Shared by all threads of a loader.
#[derive(Clone, Debug, Default)]
pub struct Stop(Arc<AtomicBool>);

impl Stop {
    /// From now on every wait ends.
    pub fn set(&self) {
        self.0.store(true, Ordering::Release);
    }

    /// Whether it has been set.
    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }

    /// An error once it has been set.
    pub fn check(&self) -> Result<()> {
        if self.is_set() { Err(Self::error()) } else { Ok(()) }
    }

    fn error() -> Error {
        Error::new(Kind::Misuse, "the loader was closed")
    }

    /// The future's answer, or an error at most 20 ms after `set`.
    pub async fn race<T>(&self, future: impl Future<Output = T>) -> Result<T> {
        let stopped = async {
            while !self.is_set() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::select! {
            biased;
            answer = future => Ok(answer),
            () = stopped => Err(Self::error()),
        }
    }
}
