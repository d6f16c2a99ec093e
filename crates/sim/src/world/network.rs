//! How connections are made, carry frames and break.

use super::{Event, TargetJob, World};
use crate::fault::WorldFault;
use crate::link::{
    ANSWER, CONTROL_TO_SOURCE, CONTROL_TO_TARGET, Connection, Frame, PUSH, Side, WANT,
};
use limosa_engine::source::SourceEvent;
use limosa_engine::target::TargetEvent;
use limosa_engine::wire::ControlFrame;

impl World {
    /// The source's dialling arrives at the target's host.
    pub(crate) fn accept(&mut self, source: usize, dial: u64) {
        let host = 1 - self.sources[source].host;
        let id = self.sources[source].id;
        let is_welcome = self.hosts[host].is_ready() && !self.hosts[host].barred.contains(&id);
        let connection = if !self.link.is_up || !is_welcome {
            None
        } else if self.sources[source].is_resuming {
            self.accept_again(source)
        } else {
            Some(self.accept_first(source))
        };
        let delay = match connection {
            Some(_) => self.link.latency(),
            None => self.random.micros(100, 3_000_000),
        };
        self.schedule(
            delay,
            Event::Dialled {
                source,
                dial,
                connection,
            },
        );
    }

    /// A migration begins here.
    fn accept_first(&mut self, source: usize) -> usize {
        let host = 1 - self.sources[source].host;
        let id = self.sources[source].id;
        let connection = self.connections.len();
        let target = self.targets.len();
        let streams = self.sources[source].config.streams;
        self.connections
            .push(Connection::new(source, target, streams));
        let local = self.clock(host);
        let job = TargetJob::new(
            id,
            host,
            &self.hosts[host],
            local,
            connection,
            self.planted_in_target(),
        );
        self.targets.push(job);
        // Nothing else wakes a target whose peer falls silent before its first frame.
        self.tell_target(target, TargetEvent::Timer);
        connection
    }

    /// The source of a guest that runs here has come back: its former connection is closed, even
    /// if nobody noticed yet that it broke.
    fn accept_again(&mut self, source: usize) -> Option<usize> {
        let host = 1 - self.sources[source].host;
        let id = self.sources[source].id;
        let target = self.targets.iter().position(|job| {
            job.is_at_work()
                && job.host == host
                && job.id == id
                && job.engine.machine().is_committed()
        })?;
        let former = self.targets[target].connection.take();
        self.close(former, Side::Target);
        let connection = self.connections.len();
        let streams = self.sources[source].config.streams;
        self.connections
            .push(Connection::new(source, target, streams));
        self.targets[target].connection = Some(connection);
        self.targets[target].is_reconciled = false;
        Some(connection)
    }

    /// The source learns whether it is connected.
    pub(crate) fn dialled(&mut self, source: usize, dial: u64, connection: Option<usize>) {
        let job = &mut self.sources[source];
        if !job.is_at_work() || !job.is_dialling || job.dials != dial {
            if let Some(connection) = connection {
                self.connections[connection].open[Side::Source as usize] = true;
                self.close(Some(connection), Side::Source);
            }
            return;
        }
        job.is_dialling = false;
        let event = match connection {
            Some(connection) if self.link.is_up => {
                job.connection = Some(connection);
                self.connections[connection].open[Side::Source as usize] = true;
                SourceEvent::Connected
            }
            _ => SourceEvent::ConnectionLost {
                reason: String::from("the target cannot be reached"),
            },
        };
        self.tell_source(source, event);
    }

    /// Sends a control frame.
    pub(crate) fn send_control(&mut self, connection: usize, from: Side, frame: ControlFrame) {
        let channel = match from {
            Side::Source => CONTROL_TO_TARGET,
            Side::Target => CONTROL_TO_SOURCE,
        };
        if self.connections[connection].open[from as usize] {
            self.transmit(connection, channel, Frame::Control(frame));
        }
    }

    /// Puts a frame that has left its sender onto the wire.
    pub(crate) fn transmit(&mut self, connection: usize, channel: usize, frame: Frame) {
        let left = self.now;
        self.transmit_at(connection, channel, frame, left);
    }

    pub(crate) fn transmit_at(
        &mut self,
        connection: usize,
        channel: usize,
        frame: Frame,
        left: limosa_engine::Timestamp,
    ) {
        let stream = &mut self.connections[connection].channels[channel];
        if stream.is_cut {
            return;
        }
        let mut left = left;
        if channel < PUSH {
            // Control frames take their time on the wire but do not queue behind the pushes.
            left = left.after(
                self.link
                    .profile
                    .rate
                    .time_for(limosa_pages::ByteCount::new(frame.bytes()))
                    .unwrap_or_default(),
            );
        }
        let arrival = self.link.arrival(stream, left);
        stream.in_flight.push_back(frame);
        self.schedule_at(
            arrival,
            Event::Deliver {
                connection,
                channel,
            },
        );
    }

    /// The next frame of a channel arrives.
    pub(crate) fn deliver(&mut self, connection: usize, channel: usize) {
        if self.link.stalled_until > self.now {
            self.schedule_at(
                self.link.stalled_until,
                Event::Deliver {
                    connection,
                    channel,
                },
            );
            return;
        }
        let wire = &mut self.connections[connection];
        let Some(frame) = wire.channels[channel].in_flight.pop_front() else {
            return;
        };
        let side = match channel {
            CONTROL_TO_SOURCE | WANT => Side::Source,
            _ => Side::Target,
        };
        if !wire.open[side as usize] {
            return;
        }
        let (source, target) = (wire.source, wire.target);
        match (frame, side) {
            (Frame::Control(frame), Side::Source) => {
                self.tell_source(source, SourceEvent::Frame(frame));
            }
            (Frame::Control(frame), Side::Target) => {
                self.tell_target(target, TargetEvent::Frame(frame));
            }
            (Frame::Close, side) => self.notice_loss(connection, side),
            (frame, Side::Source) => self.wanted(source, frame),
            (frame, Side::Target) => self.receive(target, channel, frame),
        }
    }

    /// A receiver of the target takes a frame of a push stream or an answer.
    fn receive(&mut self, target: usize, channel: usize, frame: Frame) {
        let vm = self.targets[target].vm;
        let is_answer = channel == ANSWER;
        if is_answer {
            self.targets[target].answer_bytes += frame.bytes();
        }
        match (frame, vm) {
            (Frame::Barrier(round, streams), _) => {
                let stream = u8::try_from(channel - PUSH).expect("streams are counted in a u8");
                let event = TargetEvent::Barrier {
                    stream,
                    round,
                    streams,
                };
                self.tell_target(target, event);
            }
            (Frame::Pages { first, content }, Some(vm)) => {
                self.catch_up(vm);
                self.targets[target].pages_received += content.len() as u64;
                for (page, content) in (first..).zip(content) {
                    self.land(target, vm, page, content);
                }
            }
            (Frame::Zeros(range), Some(vm)) => {
                self.catch_up(vm);
                self.targets[target].pages_received += range.count.get();
                if !self.is_planted(WorldFault::ZeroNotOverwritten) {
                    for page in range.iter() {
                        self.land(target, vm, page.get(), 0);
                    }
                }
            }
            (Frame::Stale(ranges), Some(vm)) if !self.is_planted(WorldFault::StaleIgnored) => {
                for page in ranges.into_iter().flat_map(limosa_pages::PageRange::iter) {
                    self.vms[vm].memory.make_missing(page.get());
                    self.targets[target].note_installed(page.get(), 0);
                }
            }
            _ => {}
        }
        self.check_present(target);
    }

    /// A side notices that the connection is no more.
    pub(crate) fn notice_loss(&mut self, connection: usize, side: Side) {
        if !self.connections[connection].open[side as usize] {
            return;
        }
        let reason = String::from("the connection was lost");
        match side {
            Side::Source => {
                let source = self.connections[connection].source;
                if self.sources[source].connection != Some(connection) {
                    return;
                }
                self.tell_source(source, SourceEvent::ConnectionLost { reason });
            }
            Side::Target => {
                let target = self.connections[connection].target;
                if self.targets[target].connection != Some(connection) {
                    return;
                }
                self.tell_target(target, TargetEvent::ConnectionLost { reason });
            }
        }
    }

    /// A side closes its connection: the other one learns it behind what is in flight, which now
    /// and then is lost, as a reset loses it.
    pub(crate) fn close(&mut self, connection: Option<usize>, side: Side) {
        let Some(connection) = connection else { return };
        if !self.connections[connection].open[side as usize] {
            return;
        }
        self.connections[connection].open[side as usize] = false;
        let (there, here) = match side {
            Side::Source => (CONTROL_TO_TARGET, CONTROL_TO_SOURCE),
            Side::Target => (CONTROL_TO_SOURCE, CONTROL_TO_TARGET),
        };
        if self.random.per_mille(150) {
            for (index, channel) in self.connections[connection].channels.iter_mut().enumerate() {
                if index != here {
                    channel.in_flight.clear();
                }
            }
        }
        self.transmit(connection, there, Frame::Close);
        if side == Side::Target {
            // Nobody reads the pushes any more: their senders are stuck.
            for channel in self.connections[connection]
                .channels
                .iter_mut()
                .skip(ANSWER)
            {
                channel.is_cut = true;
                channel.in_flight.clear();
            }
        }
    }

    /// The source closes what it has.
    pub(crate) fn hang_up_source(&mut self, source: usize) {
        self.sources[source].is_dialling = false;
        let connection = self.sources[source].connection.take();
        self.close(connection, Side::Source);
    }
}
