//! The layers: each does to the reads under it what it says, and nothing else.

use core::cell::RefCell;
use core::convert::Infallible;

use forebay_storage::layers::{
    Clock, DeviceProfile, FaultError, FaultPlan, Faulty, ManualClock, ProfileError, Reordered, Throttled, TraceEvent,
    Traced,
};
use forebay_storage::store::{BlockStore, Completion, Geometry, ReadError, ReadRequest};
use forebay_storage::{MAX_DEPTH, MemoryStore};
use proptest::prelude::*;

/// A finished read: id, bytes, result.
type Done<B, E> = (u32, B, Result<(), ReadError<E>>);

const MS: u64 = 1_000_000;

fn content(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 7 + i / 253) as u8).collect()
}

fn profile(text: &str) -> DeviceProfile {
    text.parse().unwrap()
}

/// Reads `count` pieces of `len` bytes one after another through `store`, as deep as it goes.
fn read_all<'b, S: BlockStore<'b>>(store: &mut S, buffers: &'b mut [u8], len: usize) -> Vec<Done<&'b [u8], S::Error>> {
    let mut requests = buffers
        .chunks_exact_mut(len)
        .enumerate()
        .map(|(id, buf)| ReadRequest::whole(id as u32, (id * len) as u64, buf))
        .collect::<Vec<_>>();
    requests.reverse();
    let mut done = Vec::new();
    while !requests.is_empty() || store.in_flight() > 0 {
        if let Some(request) = requests.pop() {
            match store.submit(request) {
                Ok(()) => continue,
                Err(request) => requests.push(request),
            }
        }
        let Completion { id, buf, result } = store.wait().unwrap();
        done.push((id, &*buf, result));
    }
    done
}

/// Completes its reads last to first, and only from `wait`; fails those of odd ids with a device error.
#[derive(Default)]
struct Backwards<'b>(Vec<ReadRequest<'b>>);

impl<'b> BlockStore<'b> for Backwards<'b> {
    type Error = &'static str;

    fn geometry(&self) -> Geometry {
        Geometry { len: u64::MAX, block: 1, queue_depth: 100 }
    }

    fn submit(&mut self, request: ReadRequest<'b>) -> Result<(), ReadRequest<'b>> {
        self.0.push(request);
        Ok(())
    }

    fn poll(&mut self) -> Option<Completion<'b, Self::Error>> {
        None
    }

    fn in_flight(&self) -> usize {
        self.0.len()
    }

    fn wait(&mut self) -> Option<Completion<'b, Self::Error>> {
        let ReadRequest { id, buf, .. } = self.0.pop()?;
        let result = if id % 2 == 1 { Err(ReadError::Device("odd")) } else { Ok(()) };
        Some(Completion { id, buf, result })
    }
}

#[test]
fn traced_sees_every_read() {
    let content = content(1000);
    let mut buffers = vec![0; 1100];
    let events = RefCell::new(Vec::new());
    let mut store = Traced::new(MemoryStore::new(&content), |event| events.borrow_mut().push(event));
    let (a, b) = buffers.split_at_mut(10);
    store.submit(ReadRequest { id: 4, offset: 30, buf: a, start: 2, len: 5 }).unwrap();
    store.submit(ReadRequest::whole(9, 7, b)).unwrap();
    assert_eq!(store.in_flight(), 2);
    assert_eq!(store.poll().unwrap().buf[2..7], content[30..35]);
    assert!(store.wait().is_some());
    assert!(store.poll().is_none());
    use TraceEvent::{Completed, Submitted};
    assert_eq!(
        *events.borrow(),
        [
            Submitted { id: 4, offset: 30, len: 5 },
            Submitted { id: 9, offset: 7, len: 1090 },
            Completed { id: 4, offset: 30, len: 5, result: Ok(()) },
            Completed { id: 9, offset: 7, len: 1090, result: Err(ReadError::OutOfBounds) },
        ]
    );
}

#[test]
fn traced_keeps_to_its_depth_and_drops_device_errors() {
    let mut buffers = [0; MAX_DEPTH + 1];
    let mut buffers = buffers.chunks_exact_mut(1);
    let mut failed = 0;
    let mut store = Traced::new(Backwards::default(), |event| {
        if let TraceEvent::Completed { id, offset, result, .. } = event {
            assert_eq!(u64::from(id) * 3, offset);
            failed += usize::from(result == Err(ReadError::Device(())));
        }
    });
    assert_eq!(usize::from(store.geometry().queue_depth), MAX_DEPTH);
    for id in 0..MAX_DEPTH as u32 {
        store.submit(ReadRequest::whole(id, u64::from(id) * 3, buffers.next().unwrap())).unwrap();
    }
    assert!(store.submit(ReadRequest::whole(0, 0, buffers.next().unwrap())).is_err());
    while store.wait().is_some() {}
    drop(store);
    assert_eq!(failed, MAX_DEPTH / 2);
}

#[test]
fn throttled_latency_and_bandwidth() {
    let content = content(4_000_000);
    let mut buffer = vec![0; 1_000_000];
    let clock = ManualClock::new();
    // One megabyte at 100 MB/s: 10 ms, after 2 ms.
    let mut store = Throttled::new(MemoryStore::new(&content), profile("bw=100MB/s,lat=2ms,qd=4"), &clock);
    assert_eq!(store.geometry().queue_depth, 4);
    store.submit(ReadRequest::whole(1, 5, &mut buffer)).unwrap();
    clock.advance_ns(12 * MS - 1);
    assert!(store.poll().is_none());
    assert_eq!(store.in_flight(), 1);
    clock.advance_ns(1);
    let done = store.poll().unwrap();
    assert!(done.result.is_ok() && *done.buf == content[5..1_000_005]);
    assert_eq!(store.in_flight(), 0);
}

#[test]
fn throttled_transfers_share_one_bus_and_latencies_overlap() {
    let content = content(4_000_000);
    let mut buffers = vec![0; 4_000_000];
    let clock = ManualClock::new();
    let mut store = Throttled::new(MemoryStore::new(&content), profile("bw=100MB/s,lat=2ms,qd=4"), &clock);
    let done = read_all(&mut store, &mut buffers, 1_000_000);
    assert!(done.iter().map(|done| done.0).eq(0..4));
    // One latency, four transfers.
    assert_eq!(clock.now_ns(), 42 * MS);

    // One at a time: four of each.
    let mut buffers = vec![0; 4_000_000];
    let clock = ManualClock::new();
    let mut store = Throttled::new(MemoryStore::new(&content), profile("bw=100MB/s,lat=2ms,qd=1"), &clock);
    read_all(&mut store, &mut buffers, 1_000_000);
    assert_eq!(clock.now_ns(), 48 * MS);
}

#[test]
fn throttled_commands_are_spaced() {
    let content = content(1000);
    let (mut buffers, mut more) = (vec![0; 1000], vec![0; 200]);
    let clock = ManualClock::new();
    let mut store = Throttled::new(MemoryStore::new(&content), profile("bw=1GB/s,iops=1k,qd=16"), &clock);
    read_all(&mut store, &mut buffers, 100);
    // The tenth command starts 9 ms after the first.
    assert_eq!(clock.now_ns(), 9 * MS + 100);
    // Idle time is not saved up: the next two are a millisecond apart.
    clock.advance_ns(100 * MS);
    let before = clock.now_ns();
    read_all(&mut store, &mut more, 100);
    assert_eq!(clock.now_ns(), before + MS + 100);
}

#[test]
fn throttled_over_a_store_that_completes_out_of_order() {
    let mut buffers = vec![0; 40];
    let clock = ManualClock::new();
    let mut store = Throttled::new(Backwards::default(), profile("bw=10B/s,qd=8"), &clock);
    let done = read_all(&mut store, &mut buffers, 10);
    // The modelled device works in order, whatever is under it.
    assert!(done.iter().map(|done| done.0).eq(0..4));
    assert_eq!(done[1].2, Err(ReadError::Device("odd")));
    assert_eq!(clock.now_ns(), 4_000 * MS);
}

#[test]
#[cfg(feature = "std")]
fn throttled_by_the_real_clock() {
    use forebay_storage::layers::StdClock;
    let content = content(2_000_000);
    let mut buffers = vec![0; 2_000_000];
    let start = std::time::Instant::now();
    let mut store = Throttled::new(MemoryStore::new(&content), profile("bw=100MB/s,lat=5ms,qd=2"), StdClock::new());
    let done = read_all(&mut store, &mut buffers, 500_000);
    assert!(done.iter().all(|(_, _, result)| result.is_ok()));
    assert!(start.elapsed() >= std::time::Duration::from_millis(25));
}

#[test]
fn profiles() {
    for name in DeviceProfile::names() {
        let profile = DeviceProfile::by_name(name).unwrap();
        assert_eq!(name.parse(), Ok(profile));
        assert!(profile.bandwidth >= 1_000_000 && profile.queue_depth >= 1 && profile.latency_ns < 1_000_000);
    }
    assert_eq!(DeviceProfile::by_name("pi4-sd").unwrap().bandwidth, 45_000_000);
    assert_eq!(
        profile("bw=400MB/s,lat=120us,iops=20k,qd=8"),
        DeviceProfile { bandwidth: 400_000_000, latency_ns: 120_000, iops: 20_000, queue_depth: 8 }
    );
    assert_eq!(
        profile("bw=1.5GiB/s, lat = 0.25 ms"),
        DeviceProfile { bandwidth: 3 << 29, latency_ns: 250_000, iops: 0, queue_depth: 1 }
    );
    assert_eq!(profile("lat=7ns,bw=3B/s,iops=1M").iops, 1_000_000);
    assert_eq!((profile("bw=3B/s").transfer_ns(1), profile("bw=3B/s").transfer_ns(0)), (333_333_334, 0));
    assert_eq!(profile("bw=1B/s").transfer_ns(u64::MAX), u64::MAX);

    let error = |text: &str| text.parse::<DeviceProfile>().unwrap_err();
    assert_eq!(error("floppy"), ProfileError::UnknownDevice);
    assert_eq!(error(""), ProfileError::UnknownDevice);
    assert_eq!(error("speed=3"), ProfileError::Key);
    assert_eq!(error("bw=1B/s,bw=2B/s"), ProfileError::Key);
    assert_eq!(error("lat=1us"), ProfileError::NoBandwidth);
    for text in ["bw=", "bw=9", "bw=0B/s", "bw=-1MB/s", "bw=nanMB/s", "bw=infMB/s", "bw=1e30GB/s", "bw=xMB/s"] {
        assert!(matches!(error(text), ProfileError::Value { key: "bw", .. }), "{text}");
    }
    for (text, key) in [("lat=5", "lat"), ("iops=0", "iops"), ("qd=0", "qd"), ("qd=65536", "qd"), ("qd=1k", "qd")] {
        assert!(matches!(error(text), ProfileError::Value { key: at, .. } if at == key), "{text}");
    }
    assert_eq!(error("qd=0").to_string(), "qd: expected a count from 1 to 65535");
}

#[test]
fn no_faults_unless_asked_for() {
    let content = content(10_000);
    let mut buffers = vec![0; 10_000];
    let mut store = Faulty::new(MemoryStore::new(&content), FaultPlan::default());
    for (id, buf, result) in read_all(&mut store, &mut buffers, 100) {
        assert_eq!(result, Ok(()));
        assert_eq!(*buf, content[id as usize * 100..][..100]);
    }
    assert_eq!((store.counts(), store.delivered()), (Default::default(), 10_000));
}

type Suffered = Done<Vec<u8>, FaultError<Infallible>>;

/// Sixteen reads that all suffer the fault of `plan`, and what they should have read.
fn all(plan: FaultPlan) -> (Vec<Suffered>, Vec<u8>) {
    let content = content(1600);
    let mut buffers = vec![0x77; 1600];
    let mut store = Faulty::new(MemoryStore::new(&content), plan);
    let done = read_all(&mut store, &mut buffers, 100);
    let counts = store.counts();
    assert_eq!(counts.device_errors + counts.short + counts.flipped + counts.stuck + counts.powerless, 16);
    assert_eq!(store.in_flight(), 0);
    (done.into_iter().map(|(id, buf, result)| (id, buf.to_vec(), result)).collect(), content)
}

#[test]
fn device_errors() {
    let (done, _) = all(FaultPlan { device_error_ppm: 1_000_000, ..FaultPlan::default() });
    for (_, buf, result) in done {
        let error = result.unwrap_err();
        assert_eq!(error, ReadError::Device(FaultError::Injected));
        assert_eq!(error.to_string(), "the device reported an error: injected fault");
        // Nothing of the read is left to be used by mistake.
        assert!(buf.iter().all(|&byte| byte == 0xa5));
    }
}

#[test]
fn short_reads() {
    let (done, content) = all(FaultPlan { short_ppm: 1_000_000, seed: 3, ..FaultPlan::default() });
    let mut lengths = Vec::new();
    for (id, buf, result) in done {
        let Err(ReadError::Short { got }) = result else { panic!("{result:?}") };
        let got = got as usize;
        assert_eq!(buf[..got], content[id as usize * 100..][..got]);
        assert!(buf[got..].iter().all(|&byte| byte == 0xa5));
        lengths.push(got);
    }
    lengths.dedup();
    assert!(lengths.len() > 8);
}

#[test]
fn flipped_bits() {
    let (done, content) = all(FaultPlan { flip_ppm: 1_000_000, ..FaultPlan::default() });
    let mut places = Vec::new();
    for (id, buf, result) in done {
        assert_eq!(result, Ok(()));
        let differing: Vec<_> = buf
            .iter()
            .zip(&content[id as usize * 100..])
            .enumerate()
            .filter(|(_, (read, stored))| read != stored)
            .map(|(at, (read, stored))| (at, read ^ stored))
            .collect();
        assert_eq!(differing.len(), 1);
        assert_eq!(differing[0].1.count_ones(), 1);
        places.push(differing[0]);
    }
    places.sort_unstable();
    places.dedup();
    assert!(places.len() > 8);
}

/// A fault touches only the range of the buffer that is read.
#[test]
fn faults_keep_to_the_range() {
    let content = content(100);
    for plan in [
        FaultPlan { device_error_ppm: 1_000_000, ..FaultPlan::default() },
        FaultPlan { short_ppm: 1_000_000, ..FaultPlan::default() },
        FaultPlan { flip_ppm: 1_000_000, ..FaultPlan::default() },
        FaultPlan { stuck_ppm: 1_000_000, ..FaultPlan::default() },
        FaultPlan { power_off_after: Some(3), ..FaultPlan::default() },
    ] {
        let mut buf = [0x11; 30];
        let mut store = Faulty::new(MemoryStore::new(&content), plan);
        store.submit(ReadRequest { id: 0, offset: 50, buf: &mut buf, start: 10, len: 10 }).unwrap();
        let done = store.wait().unwrap();
        assert!(done.buf[..10].iter().chain(&done.buf[20..]).all(|&byte| byte == 0x11), "{plan:?}");
        assert_ne!(done.buf[10..20], content[50..60], "{plan:?}");
    }
}

#[test]
fn stuck_reads_are_given_up() {
    let content = content(100);
    let mut buf = [0; 100];
    let plan = FaultPlan { stuck_ppm: 1_000_000, stuck_polls: 5, ..FaultPlan::default() };
    let mut store = Faulty::new(MemoryStore::new(&content), plan);
    store.submit(ReadRequest::whole(3, 0, &mut buf)).unwrap();
    // The poll in which the read gets stuck, and five more.
    for _ in 0..6 {
        assert!(store.poll().is_none());
        assert_eq!(store.in_flight(), 1);
    }
    let done = store.poll().unwrap();
    assert_eq!((done.id, done.result), (3, Err(ReadError::Gone)));
    assert_eq!(store.in_flight(), 0);
    store.submit(ReadRequest::whole(4, 0, done.buf)).unwrap();
    assert_eq!(store.wait().unwrap().result, Err(ReadError::Gone));
}

#[test]
fn power_fails_after_exactly_so_many_bytes() {
    let content = content(1000);
    for budget in [0, 1, 99, 100, 101, 555, 999, 1000] {
        let mut buffers = vec![0; 1000];
        let plan = FaultPlan { power_off_after: Some(budget), ..FaultPlan::default() };
        let mut store = Faulty::new(MemoryStore::new(&content), plan);
        let mut left = budget as usize;
        for (id, buf, result) in read_all(&mut store, &mut buffers, 100) {
            let arrived = left.min(100);
            left -= arrived;
            assert_eq!(
                result,
                if arrived == 100 { Ok(()) } else { Err(ReadError::Gone) },
                "budget {budget}, read {id}"
            );
            assert_eq!(buf[..arrived], content[id as usize * 100..][..arrived]);
            assert!(buf[arrived..].iter().all(|&byte| byte == 0xa5));
        }
        assert_eq!(store.delivered(), budget);
        assert_eq!(store.counts().powerless, 10 - budget / 100);
    }
}

#[test]
fn errors_from_below_pass() {
    let mut buffers = vec![0; 40];
    let mut store = Faulty::new(Backwards::default(), FaultPlan { flip_ppm: 1_000_000, ..FaultPlan::default() });
    let done = read_all(&mut store, &mut buffers, 10);
    let result = |id| done.iter().find(|done| done.0 == id).unwrap().2;
    assert_eq!(result(1), Err(ReadError::Device(FaultError::Inner("odd"))));
    assert_eq!(result(2), Ok(()));
    assert_eq!(store.counts().flipped, 2);
}

proptest! {
    /// The same seed gives the same faults, at about the rate asked for.
    #[test]
    fn faults_come_from_the_seed(seed: u64) {
        let content = content(20_000);
        let plan = FaultPlan {
            seed,
            device_error_ppm: 100_000,
            short_ppm: 100_000,
            flip_ppm: 100_000,
            stuck_ppm: 100_000,
            stuck_polls: 3,
            power_off_after: None,
        };
        let run = || {
            let mut buffers = vec![0; 20_000];
            let mut store = Faulty::new(MemoryStore::new(&content), plan);
            let done = read_all(&mut store, &mut buffers, 20);
            let done: Vec<_> = done.into_iter().map(|(id, buf, result)| (id, buf.to_vec(), result)).collect();
            (done, store.counts())
        };
        let (done, counts) = run();
        prop_assert_eq!(&run(), &(done.clone(), counts));
        prop_assert_eq!(done.len(), 1000);
        for count in [counts.device_errors, counts.short, counts.flipped, counts.stuck] {
            prop_assert!((40..=170).contains(&count), "{:?}", counts);
        }
        let failed = done.iter().filter(|done| done.2.is_err()).count() as u64;
        prop_assert_eq!(failed, counts.device_errors + counts.short + counts.stuck);
    }

    /// Every read completes once with its own bytes; the order depends on the seed alone.
    #[test]
    fn reordered_loses_nothing(seed: u64, depth in 1u16..40) {
        let content = content(3000);
        let run = |seed| {
            let mut buffers = vec![0; 3000];
            let mut store = Reordered::new(MemoryStore::with_depth(&content, depth), seed);
            let mut order = Vec::new();
            for (id, buf, result) in read_all(&mut store, &mut buffers, 30) {
                assert_eq!(result, Ok(()));
                assert_eq!(*buf, content[id as usize * 30..][..30]);
                order.push(id);
            }
            order
        };
        let order = run(seed);
        prop_assert_eq!(&run(seed), &order);
        let mut sorted = order.clone();
        sorted.sort_unstable();
        prop_assert!(sorted.iter().copied().eq(0..100));
        if depth > 3 {
            prop_assert_ne!(&order, &sorted);
            prop_assert_ne!(&run(!seed), &order);
        }
    }
}

#[test]
fn reordered_polls_come_up_empty_at_times() {
    let content = content(30);
    let mut buffers = [0; 30];
    let mut store = Reordered::new(MemoryStore::with_depth(&content, 30), 1);
    for (id, buf) in buffers.chunks_exact_mut(1).enumerate() {
        store.submit(ReadRequest::whole(id as u32, id as u64, buf)).unwrap();
    }
    let (mut empty, mut done) = (0, 0);
    while store.in_flight() > 0 {
        match store.poll() {
            Some(_) => done += 1,
            None => empty += 1,
        }
    }
    assert_eq!(done, 30);
    assert!(empty > 5);
}

/// Layers over layers: what survives them all is right or is said to be wrong.
#[test]
fn stacked() {
    let content = content(100_000);
    let mut buffers = vec![0; 100_000];
    let clock = ManualClock::new();
    let plan = FaultPlan { device_error_ppm: 50_000, stuck_ppm: 50_000, stuck_polls: 9, ..FaultPlan::default() };
    let faulty = Faulty::new(MemoryStore::with_depth(&content, 32), plan);
    let throttled = Throttled::new(faulty, DeviceProfile::by_name("ufs-4.0").unwrap(), &clock);
    let (mut started, mut ended) = (0, 0);
    let mut store = Traced::new(Reordered::new(throttled, 11), |event| match event {
        TraceEvent::Submitted { .. } => started += 1,
        TraceEvent::Completed { .. } => ended += 1,
    });
    let mut failed = 0;
    for (id, buf, result) in read_all(&mut store, &mut buffers, 100) {
        match result {
            Ok(()) => assert_eq!(*buf, content[id as usize * 100..][..100]),
            Err(_) => failed += 1,
        }
    }
    drop(store);
    assert_eq!((started, ended), (1000, 1000));
    assert!((50..200).contains(&failed), "{failed}");
}
