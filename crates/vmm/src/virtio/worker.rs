//! The thread of one device: waits for the guest's doorbells and for what the device waits for itself.

use super::device::QUEUES_MAX;
use super::transport::Transport;
use limosa_os::kvm::Doorbell;
use limosa_os::socket;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::thread;
use std::time::Instant;

/// Ends its thread when it is dropped, and does not wait for that: the thread may be held up by a page
/// that never comes.
#[derive(Debug)]
pub(super) struct Worker {
    stop: Arc<Doorbell>,
}

impl Worker {
    pub(super) fn start(transport: &Arc<Transport>) -> io::Result<Self> {
        let stop = Arc::new(Doorbell::new()?);
        let (transport, heard) = (Arc::clone(transport), Arc::clone(&stop));
        thread::Builder::new()
            .name(format!("virtio-{}", transport.index()))
            .spawn(move || {
                if let Err(error) = serve(&transport, &heard) {
                    tracing::error!(%error, device = transport.index(), "a device stands still");
                }
            })?;
        Ok(Self { stop })
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        if let Err(error) = self.stop.ring() {
            tracing::warn!(%error, "a device's thread does not hear that it is over");
        }
    }
}

fn serve(transport: &Transport, stop: &Doorbell) -> io::Result<()> {
    let bells = transport.bells();
    loop {
        let (input, due) = transport.waits_for();
        let mut sources: [Option<&dyn AsFd>; QUEUES_MAX + 2] = [None; QUEUES_MAX + 2];
        sources[0] = Some(stop);
        sources[1] = input.as_ref().map(|input| input as &dyn AsFd);
        for (place, bell) in sources[2..].iter_mut().zip(bells) {
            *place = Some(bell);
        }
        let [is_over, has_input, rung @ ..] = socket::wait_readable(sources, due.map(left))?;
        if is_over {
            return Ok(());
        }
        if due.is_some() {
            transport.tick();
        }
        for (queue, bell) in bells.iter().enumerate() {
            let is_called = rung[queue] && bell.hear();
            if is_called || has_input && queue == 0 {
                transport.serve(queue);
            }
        }
    }
}

/// Milliseconds until then, rounded up.
fn left(due: Instant) -> u32 {
    let left = due.saturating_duration_since(Instant::now());
    u32::try_from(left.as_micros().div_ceil(1000)).unwrap_or(u32::MAX)
}
