// Power losses during work of every kind on qcow2 images: nothing is corrupt, nothing that was flushed is lost, nothing
// else than what was written appears.

#include <gtest/gtest.h>

#include "engine/crash_explorer.h"
#include "engine/works.h"
#include "support/effort.h"
#include "support/faulty.h"

namespace qcow::test {
namespace {

/// Room that comes and goes. Thread-safe.
class Weather {
public:
    explicit Weather(std::uint64_t seed) : random_(seed) {}

    void change() {
        const std::lock_guard lock(mutex_);
        if (!std::exchange(begun_, true) || random_.chance(20)) {
            room->set(random_.below(16));
        } else if (random_.chance(10)) {
            room->set(std::nullopt);
        }
    }

    const std::shared_ptr<FreeBlocks> room = std::make_shared<FreeBlocks>();

private:
    std::mutex mutex_;
    Random random_;
    bool begun_ = false;
};

/// What was done, and to which files.
struct Recorded {
    const Work& work;
    Files before;
    Files after;
    Kept kept;
    StorageLog log = {};
    std::unique_ptr<SectorModel> model = nullptr;
    std::uint64_t refused = 0;  // for want of room

    [[nodiscard]] History history(const StorageLog& shown) const {
        History history{shown, before, *model, kept, work.kind.dirty || work.mix.snapshot != 0};
        if (work.kind.can_compress()) history.afterwards.write_compressed = 1;
        history.afterwards.zero = 1;
        history.discards_read_as_zeros = work.kind.discards_read_as_zeros();
        return history;
    }
};

std::unique_ptr<Recorded> record(const Work& work, Random& random) {
    auto prepared = prepare(work.kind, random);
    auto result =
        std::make_unique<Recorded>(Recorded{work, copy_of(prepared.files), prepared.files, std::move(prepared.kept)});
    auto& log = result->log;
    const auto sectors = work.kind.create.size / sector_bytes;
    result->model = std::make_unique<SectorModel>(sectors, work.mix.resized_most);
    // Where threads meet flushes, these must not be over at once.
    const std::chrono::microseconds flush_time(work.threads > 1 ? 200 : 0);
    Weather weather(random.below(~std::uint64_t{0}));
    Files recorded;
    for (const auto& [name, storage] : prepared.files) {
        recorded[name] =
            std::make_shared<SparseStorage>(std::make_shared<RecordingStorage>(storage, name, log, flush_time),
                                            weather.room, SparseStorage::Zeros::holes);
    }
    const auto image = value_of(open_kind(work.kind, recorded, true));
    Guest guest(*image, *result->model, [&] { return log.mark(); }, work.kind.discards_read_as_zeros());
    guest.adopt();
    if (work.kind.open.write.cache == CacheMode::writethrough) guest.expect_writethrough();
    perform(work, guest, random, [&](const auto& call) {
        if (work.full) weather.change();
        const Result<void> done = call();
        if (!done && !(work.full && done.error().code == Errc::no_space)) value_of(done);
    });
    result->kept.made = guest.snapshots();
    result->refused = weather.room->refused();
    if (guest.failed_flushes() != 0) throw std::runtime_error("a flush failed for want of room");
    if (auto wrong = guest.verify(0, guest.sectors())) throw std::runtime_error(*wrong);
    if (work.close) value_of(guest.close());
    if (work.compact) value_of(compact(recorded, work));
    return result;
}

/// Where a table is, by the field of the header that says so.
std::uint64_t field_of(const Files& files, std::size_t at) {
    return load_be<std::uint64_t>(contents_of(*files.at(image_name)), at);
}

/// That the work was what its name says.
void expect_moved(const Recorded& recorded) {
    constexpr std::size_t l1_table = 40;
    constexpr std::size_t refcount_table = 48;
    const auto& name = recorded.work.name;
    const auto moved = [&](std::size_t table) {
        return field_of(recorded.before, table) != field_of(recorded.after, table);
    };
    EXPECT_TRUE(name != "L1Grows" || moved(l1_table));
    EXPECT_TRUE(name != "RefcountTableGrows" || moved(refcount_table));
}

/// How many changes of files fell between the beginning and the end of a flush.
std::size_t changes_during_flushes(const StorageLog& log) {
    using Kind = StorageEvent::Kind;
    std::size_t flushing = 0;
    std::size_t changes = 0;
    for (const auto& event : log.events()) {
        if (event.kind == Kind::flush_begin) ++flushing;
        if (event.kind == Kind::flush_end) --flushing;
        if (flushing != 0 && event.kind == Kind::write) ++changes;
    }
    return changes;
}

Opener opener(const ImageKind& kind) {
    return [kind](const Files& files, bool writable) { return open_kind(kind, files, writable); };
}

/// The short form takes some of the nasty states, the long form all.
CrashOptions options_of_a_round() {
    if (sanitized) return {.samples = 15, .most = 15};
    if (effort() == 1) return {.samples = 60, .most = 240, .qemu_checks = 4};
    return {.qemu_checks = 4};
}

class CrashTest : public testing::TestWithParam<Work> {};

TEST_P(CrashTest, LosesNothing) {
    const auto& c = GetParam();
    unsigned states = 0;
    unsigned again = 0;
    unsigned qemu_checks = 0;
    for (unsigned round = 0; round < effort(); ++round) {
        auto random = Random::named(fmt::format("{}/{}", c.name, round));
        const auto options = options_of_a_round();
        const auto recorded = record(c, random);
        const auto report = CrashExplorer(recorded->history(recorded->log), opener(c.kind), random).explore(options);
        states += report.states;
        again += report.again;
        qemu_checks += report.qemu_checks;
        ASSERT_FALSE(report.violation) << "round " << round << ": " << *report.violation << "\n" << replay_hint();
        ASSERT_GE(report.states, options.samples);
        expect_moved(*recorded);
        ASSERT_TRUE(!c.full || recorded->refused != 0);
        ASSERT_TRUE(c.threads == 1 || c.job != Work::Job::none || changes_during_flushes(recorded->log) >= 10);
    }
    RecordProperty("states", static_cast<int>(states));
    std::cout << "covered " << states << " states after power loss\ncovered " << again
              << " of these after a second one\ncovered " << qemu_checks << " of these by QEMU's check, too\n";
}

INSTANTIATE_TEST_SUITE_P(Work, CrashTest, testing::ValuesIn(works()), [](const auto& test) { return test.param.name; });

/// The engine as it would be if it left out flushes: what its log says is then believed less than it says.
class BrokenEngineTest : public testing::Test {
protected:
    /// Whether it shows that those flushes are missing, given by the events in which they end.
    static bool caught(const std::function<bool(const History&, std::size_t end)>& left_out) {
        for (const auto* name : {"DiscardAndReuse", "Snapshot", "RefcountTableGrows"}) {
            const auto c = work_named(name);
            Random random(1);  // what is found must not be luck
            const auto recorded = record(c, random);
            const auto history = recorded->history(recorded->log);
            const auto broken = recorded->log.without_flushes([&](std::size_t end) { return left_out(history, end); });
            if (CrashExplorer(recorded->history(broken), opener(c.kind), random).explore({}).violation) return true;
        }
        return false;
    }
};

TEST_F(BrokenEngineTest, FlushesThatDoNothingAreFound) {
    EXPECT_TRUE(caught([](const History&, std::size_t) { return true; }));
}

/// The flushes that the guest did not ask for, which keep refcounts, tables and data in order.
TEST_F(BrokenEngineTest, MetadataWithoutOrderAreFound) {
    EXPECT_TRUE(caught([](const History& history, std::size_t end) { return !history.model.flushing_at(end); }));
}

TEST_F(BrokenEngineTest, OneFlushInThreeMissingIsFound) {
    unsigned n = 0;
    EXPECT_TRUE(caught([&](const History&, std::size_t) { return ++n % 3 == 0; }));
}

}  // namespace
}  // namespace qcow::test
