//! The engine allocates nothing once it is made.

use forebay::convert::{ConvertOptions, WeightChoice};
use forebay_conformance::{Setup, arena_memory, arena_of, fixtures, image_of, plan};
use forebay_kernels::exec::{Backend, Exec};
use forebay_kernels::pool::ThreadPool;
use forebay_runtime::drive::{Reached, Unobserved, advance};
use forebay_runtime::engine::{Engine, Output};
use forebay_runtime::open::Image;
use forebay_runtime::plan::Plan;
use forebay_storage::FileStore;

#[test]
fn steady_state_allocates_nothing() {
    let options = ConvertOptions { weights: Some(WeightChoice::Q4), ..ConvertOptions::default() };
    let bytes = image_of(&fixtures().join("lfm2moe"), &options).unwrap();
    let setup = Setup { logit_rows: 1, workers: 2, ..Setup::default() };
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = dir.path().join("model.fby");
    std::fs::write(&path, &bytes).unwrap();
    // The least arena, so that every token reads units.
    let arena = plan(&bytes, &setup).unwrap().least;
    let mut memory = arena_memory(arena);
    std::thread::scope(|scope| {
        let arena = arena_of(&mut memory, arena);
        let mut store = FileStore::open_in(scope, &path, 4).unwrap();
        let image = Image::open(&mut store, &arena, false).unwrap();
        let plan = Plan::new(&image, setup.limits(arena.len() as u64)).unwrap();
        let mut engine = Engine::new(&image, plan, &arena, 4).unwrap();
        let pool = ThreadPool::new(2);
        let exec = Exec { backend: Backend::detect(), workers: &pool };
        let mut token = 1;
        for position in 0..32 {
            let mut reached = None;
            let counted = allocation_counter::measure(|| {
                reached = Some(engine.feed(&[token], Output::Last).and_then(|()| {
                    loop {
                        if advance(&mut engine, &mut store, &exec, &mut Unobserved)? == Reached::Idle {
                            break Ok(());
                        }
                    }
                }));
            });
            reached.expect("the closure ran").unwrap();
            token = (token * 7 + 3) % 288;
            if position > 0 {
                assert_eq!(counted.count_total, 0, "token {position} allocated");
            }
        }
        assert!(engine.stats().misses > 32, "nothing was streamed");
        let probe = allocation_counter::measure(|| drop(std::hint::black_box(Box::new(1))));
        assert_eq!(probe.count_total, 1, "the counter does not count");
    });
}
