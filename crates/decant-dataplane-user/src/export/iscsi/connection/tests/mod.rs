//! Orders of events that a thread meets seldom, each made to happen.

mod world;

use std::sync::Arc;
use std::sync::mpsc::channel;

use decant_iscsi::pdu::*;
use decant_iscsi::serial::Serial;

use super::UNSENT;
use crate::stream::Socket;
use world::{Client, House, PATIENCE, World, pdu};

const MIB: usize = 1 << 20;

fn task(function: u8, referenced: u32) -> TaskRequest {
    TaskRequest { immediate: true, function, task: 0x77, referenced, ..TaskRequest::default() }
}

fn is_task_response(header: &Header) -> bool {
    matches!(header, Header::TaskResponse(response) if response.task == 0x77 && response.response == 0)
}

/// Parks reads of 1 MiB each, from 16 MiB on.
fn park(house: &House, world: &mut World, count: usize) {
    *house.disk.parked_from.lock().unwrap() = 16 << 20;
    for index in 0..count {
        let read = world.client.read((16 << 20) + index * MIB, MIB);
        world.send(read, &[]);
    }
    assert_eq!(house.disk.parked.lock().unwrap().len(), count);
}

/// The bytes of reads among the answers.
fn data_of(answers: &[(Header, Vec<u8>)]) -> usize {
    answers.iter().map(|(header, data)| if matches!(header, Header::DataIn(_)) { data.len() } else { 0 }).sum()
}

#[test]
fn a_write_is_whole_although_parked_reads_come_in_its_midst() {
    let house = House::new();
    let mut world = house.session(1);
    park(&house, &mut world, 16);
    let data: Vec<u8> = (0..512 * 1024).map(|at| (at / 512 % 251) as u8).collect();
    let write = world.client.write(4 * MIB, data.len());
    world.send(write, &data[..256 * 1024]);
    let asked = world.answers();
    let Some((Header::ReadyToTransfer(r2t), _)) = asked.last() else { panic!("{asked:?}") };
    assert_eq!((r2t.offset, r2t.length), (256 * 1024, 256 * 1024));
    let out =
        DataOut { is_final: true, task: write.task, transfer: r2t.transfer, offset: r2t.offset, ..DataOut::default() };
    let bytes = pdu(out, &data[256 * 1024..]);
    world.send_bytes(&bytes[..bytes.len() / 2]);
    house.disk.answer_parked(9);
    world.settle().unwrap();
    world.send_bytes(&bytes[bytes.len() / 2..]);
    let answers = world.answers();
    assert_eq!(data_of(&answers), 16 * MIB);
    assert!(house.disk.bytes.lock().unwrap()[4 * MIB..][..data.len()] == data, "the write is where it belongs");
}

#[test]
fn what_was_read_elsewhere_waits_for_an_initiator_that_reads_nothing() {
    let house = House::new();
    let mut world = house.session(1);
    park(&house, &mut world, 32);
    house.disk.answer_parked(9);
    world.settle().unwrap();
    let most = UNSENT + MIB + 64 * 1024;
    assert!((UNSENT..most).contains(&world.link.out.len()), "{} bytes are to be sent", world.link.out.len());
    assert!(world.link.arrived.len() > 28, "the others wait");
    // Until they are answered they are outstanding, and the window does not open for more.
    assert_eq!(data_of(&world.answers()), 32 * MIB);
    assert!(world.link.arrived.is_empty() && world.link.out.is_empty());
}

#[test]
fn a_kick_while_the_rest_is_sent_does_not_hold_up_the_end() {
    let house = House::new();
    let mut world = house.session(1);
    house.disk.flushing.shut();
    let flush = world.client.command(&[0x35], 0, false);
    world.send(flush, &[]);
    // More than the socket takes, so that there is a rest.
    let read = world.client.read(0, MIB);
    world.send(read, &[]);
    assert!(!world.link.out.is_empty());
    house.disk.flushing.wait_for(1);
    house.shared.target().shut_down();
    world.settle().unwrap();
    assert!(world.link.closing);
    // A flush that is under way is waited for. Its end kicks the thread, which is sending the rest, once and not again.
    house.disk.flushing.open();
    world.wait_for_kick();
    let World { mut link, client } = world;
    drop(client);
    let (ended, end) = channel();
    std::thread::spawn(move || {
        let socket = Socket::from(Arc::clone(&link.socket));
        let _ = link.send_rest(&socket);
        link.finish();
        let _ = ended.send(link.machine.is_drained());
    });
    assert_eq!(end.recv_timeout(PATIENCE), Ok(true), "the connection's thread ends");
}

#[test]
fn what_comes_back_is_answered_while_a_writer_never_rests() {
    const WRITES: u32 = 1000;
    let house = House::new();
    let mut world = house.session(1);
    park(&house, &mut world, 1);
    // After each write there are more in the socket, as if the initiator were always faster.
    let (mut sender, disk) = (Sender::new(&world.client, WRITES), Arc::clone(&house.disk));
    sender.fill();
    let mut count = 0;
    *house.disk.on_write.lock().unwrap() = Some(Box::new(move |_, _| {
        count += 1;
        sender.fill();
        if count == 100 {
            disk.answer_parked(9);
        }
    }));
    world.link.more = true;
    let written = || house.disk.writes.lock().unwrap().len();
    while written() < WRITES as usize {
        let goes_on = world.link.round().unwrap() || world.link.receive().unwrap();
        assert!(goes_on || written() == WRITES as usize, "the socket is never empty");
    }
    let answers = world.answers();
    let at = answers.iter().position(|(header, _)| matches!(header, Header::DataIn(_))).unwrap();
    assert!(at < 300, "the read was answered after {at} writes");
    *house.disk.on_write.lock().unwrap() = None;
}

/// Sends writes of 4 KiB as fast as the socket takes them.
struct Sender {
    stream: std::os::unix::net::UnixStream,
    next: u32,
    end: u32,
    rest: Vec<u8>,
}

impl Sender {
    fn new(client: &Client, count: u32) -> Self {
        let first = client.next_cmd_sn().0;
        Self { stream: client.stream.try_clone().unwrap(), next: first, end: first + count, rest: Vec::new() }
    }

    fn fill(&mut self) {
        use std::io::Write;
        loop {
            if self.rest.is_empty() && self.next < self.end {
                for _ in 0..16.min(self.end - self.next) {
                    let command = Client::write_of(Serial(self.next), 0, 4096);
                    self.rest.extend(pdu(command, &[5; 4096]));
                    self.next += 1;
                }
            }
            match self.stream.write(&self.rest) {
                Ok(1..) if self.rest.is_empty() => return,
                Ok(0) => return,
                Ok(count) => drop(self.rest.drain(..count)),
                Err(_) => return,
            }
        }
    }
}

#[test]
fn a_reset_while_data_are_read_to_their_place_leaves_no_buffer_behind() {
    let house = House::new();
    let (mut one, mut two) = (house.session(1), house.session(2));
    let write = one.client.write(0, 256 * 1024);
    let bytes = pdu(write, &[1; 256 * 1024]);
    one.send_bytes(&bytes[..100 * 1024]);
    let slot = one.link.slots.iter().position(|slot| slot.buffer.is_some()).expect("the data have a buffer");
    // The other session's reset comes between this one's look at where its data belong and its reading them there.
    one.client.outgoing.extend(&bytes[100 * 1024..150 * 1024]);
    one.client.push();
    assert!(one.link.machine.data_wanted().is_some());
    two.send(task(task_function::LUN_RESET, 0), &[]);
    one.link.more = true;
    assert!(one.link.receive().unwrap());
    assert!(one.link.slots[slot].buffer.is_none(), "the task is gone, and its buffer with it");
    one.send_bytes(&bytes[150 * 1024..]);
    two.answers_with(is_task_response);
    // What the next write in that slot sends is what is written.
    let attention = one.client.command(&[0], 0, false);
    one.send(attention, &[]);
    let write = one.client.write(MIB, 16 * 1024);
    one.send(write, &[2; 16 * 1024]);
    one.answers();
    let bytes = house.disk.bytes.lock().unwrap();
    assert!(bytes[0] == 7 && bytes[MIB..][..16 * 1024].iter().all(|byte| *byte == 2));
}

/// A buffer of another length than the task's is another task's.
#[test]
fn data_are_read_to_no_buffer_of_another_length() {
    let house = House::new();
    let mut world = house.session(1);
    let write = world.client.write(0, 256 * 1024);
    let bytes = pdu(write, &[1; 256 * 1024]);
    world.send_bytes(&bytes[..1000]);
    let wanted = world.link.machine.data_wanted().unwrap();
    assert_eq!(wanted.total, 256 * 1024);
    let larger = world.link.spare.take(MIB);
    let own = world.link.slots[wanted.task.0 as usize].buffer.replace(larger).unwrap();
    assert!(world.link.buffer_of(&wanted).is_none());
    world.link.slots[wanted.task.0 as usize].buffer = Some(own);
    assert!(world.link.buffer_of(&wanted).is_some());
}

#[test]
fn a_parked_read_that_is_aborted_ends_at_once() {
    let house = House::new();
    let mut world = house.session(1);
    park(&house, &mut world, 2);
    world.send(task(task_function::ABORT_TASK_SET, 0), &[]);
    let answers = world.answers();
    assert!(matches!(&answers[..], [(header, _)] if is_task_response(header)), "{answers:?}");
    // What comes late finds nobody, in the slot's next task neither.
    let parked = std::mem::take(&mut *house.disk.parked.lock().unwrap());
    *house.disk.parked_from.lock().unwrap() = u64::MAX;
    let read = world.client.read(0, 4096);
    world.send(read, &[]);
    parked.into_iter().for_each(|(_, length, sink)| sink.complete(Ok(&vec![9; length])));
    let answers = world.answers();
    assert!(matches!(&answers[..], [(Header::DataIn(_), data)] if *data == [7; 4096]));
}

#[test]
fn an_abort_is_not_taken_for_one_of_the_slots_next_task() {
    let house = House::new();
    let (mut one, mut two) = (house.session(1), house.session(2));
    park(&house, &mut one, 2);
    *house.disk.parked_from.lock().unwrap() = u64::MAX;
    // All in one round: both outcomes are here, a reset has come before them, and two reads that will have their slots.
    for (header, length) in [(0, 0), (1, 4096), (2, 4096)] {
        let command =
            if length == 0 { one.client.command(&[0], 0, false) } else { one.client.read(header * MIB, length) };
        one.client.outgoing.extend(pdu(command, &[]));
    }
    one.client.push();
    one.link.more = true;
    assert!(one.link.receive().unwrap());
    two.send(task(task_function::LUN_RESET, 0), &[]);
    house.disk.answer_parked(9);
    let answers = one.answers();
    assert!(
        matches!(&answers[..], [(Header::ScsiResponse(_), _), (Header::DataIn(_), a), (Header::DataIn(_), b)]
            if *a == [7; 4096] && *b == [7; 4096]),
        "a unit attention, and both reads: {answers:?}"
    );
}

/// FUA: after a flush, and by no worker, of whom there are few for all sessions.
#[test]
fn reads_with_fua_that_wait_for_their_bytes_hold_up_nobody() {
    let house = House::new();
    let (mut one, mut two) = (house.session(1), house.session(2));
    *house.disk.parked_from.lock().unwrap() = 16 << 20;
    house.disk.flushing.shut();
    for index in 0..6 {
        let mut read = one.client.read((16 << 20) + index * 4096, 4096);
        read.cdb[1] = 0x08;
        one.send(read, &[]);
    }
    house.disk.flushing.wait_for(super::super::WORKERS);
    assert!(house.disk.parked.lock().unwrap().is_empty(), "what is cached goes first");
    house.disk.flushing.open();
    while house.disk.parked.lock().unwrap().len() < 6 {
        one.wait_for_kick();
        one.link.inbox.kick.clear();
        one.settle().unwrap();
    }
    let flush = two.client.command(&[0x35], 0, false);
    two.send(flush, &[]);
    two.answers_with(|header| matches!(header, Header::ScsiResponse(response) if response.task == flush.task));
    house.disk.answer_parked(9);
    assert_eq!(data_of(&one.answers()), 6 * 4096);
}

#[test]
fn requests_that_were_aborted_before_they_began_are_not_performed() {
    let house = House::new();
    let mut world = house.session(1);
    *house.disk.ready.lock().unwrap() = false;
    let write = world.client.write(0, 4096);
    world.send(write, &[1; 4096]);
    assert_eq!(world.link.requests.len(), 1);
    world.send(task(task_function::ABORT_TASK, write.task), &[]);
    assert!(is_task_response(&world.answers()[0].0));
    *house.disk.ready.lock().unwrap() = true;
    world.settle().unwrap();
    assert!(house.disk.writes.lock().unwrap().is_empty(), "nobody wanted it");
}

/// WRITE SAME of so many blocks with a block that is not zeros.
fn write_same(world: &mut World, blocks: u16) {
    let [high, low] = blocks.to_be_bytes();
    let fill = world.client.command(&[0x41, 0, 0, 0, 0, 0, 0, high, low, 0], 512, true);
    world.send(fill, &[3; 512]);
}

#[test]
fn work_that_was_aborted_is_skipped_and_what_is_under_way_breaks_off() {
    let house = House::new();
    let mut world = house.session(1);
    house.disk.writing.shut();
    for _ in 0..12 {
        write_same(&mut world, 16 * 1024);
    }
    house.disk.writing.wait_for(super::super::WORKERS);
    world.send(task(task_function::ABORT_TASK_SET, 0), &[]);
    assert!(world.ping().is_empty(), "what is under way is waited for");
    house.disk.writing.open();
    world.answers_with(is_task_response);
    assert_eq!(house.disk.writes.lock().unwrap().len(), super::super::WORKERS, "one piece of each that had begun");
}

#[test]
fn work_of_a_connection_that_is_gone_is_skipped() {
    let house = House::new();
    let mut world = house.session(1);
    house.disk.writing.shut();
    for _ in 0..12 {
        write_same(&mut world, 16 * 1024);
    }
    house.disk.writing.wait_for(super::super::WORKERS);
    let (ended, end) = channel();
    let disk = Arc::clone(&house.disk);
    let World { mut link, client } = world;
    drop(client);
    std::thread::spawn(move || {
        link.leave();
        disk.writing.open();
        link.drain();
        let _ = ended.send(());
    });
    assert_eq!(end.recv_timeout(PATIENCE), Ok(()));
    assert_eq!(house.disk.writes.lock().unwrap().len(), super::super::WORKERS);
}
