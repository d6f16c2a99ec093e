//! The network interface as smoltcp has it: a token for each frame that may be taken or sent.

use limosa_micro_runtime::network::{FRAME_BYTES_MAX, Frame, Network, Receiver, Sender};
use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::time::Instant;

/// An interface of the guest.
pub(crate) struct Link(pub(crate) Network);

/// A frame that has come.
pub(crate) struct Arrival<'a> {
    receiver: &'a mut Receiver,
    frame: Frame,
}

/// The right to send a frame.
pub(crate) struct Departure<'a>(&'a mut Sender);

impl Device for Link {
    type RxToken<'a> = Arrival<'a>;
    type TxToken<'a> = Departure<'a>;

    /// Nothing is taken that could not be answered: the network keeps it.
    fn receive(&mut self, _: Instant) -> Option<(Arrival<'_>, Departure<'_>)> {
        if !self.0.sender.is_ready() {
            return None;
        }
        let frame = self.0.receiver.receive()?;
        let arrival = Arrival {
            receiver: &mut self.0.receiver,
            frame,
        };
        Some((arrival, Departure(&mut self.0.sender)))
    }

    fn transmit(&mut self, _: Instant) -> Option<Departure<'_>> {
        let sender = &mut self.0.sender;
        sender.is_ready().then_some(Departure(sender))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = FRAME_BYTES_MAX;
        capabilities
    }
}

impl RxToken for Arrival<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, take: F) -> R {
        let result = take(self.receiver.bytes(&self.frame));
        self.receiver.give_back(self.frame);
        result
    }
}

impl TxToken for Departure<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, bytes: usize, fill: F) -> R {
        self.0.send(bytes, fill)
    }
}
