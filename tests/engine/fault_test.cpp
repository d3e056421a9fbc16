// Every operation of Storage fails in turn: the request that it belongs to says so, nothing becomes corrupt, and what
// was flushed is there when the image is opened again, with and without a power loss.

#include <gtest/gtest.h>

#include <array>
#include <span>

#include "engine/faulty_run.h"
#include "engine/works.h"
#include "support/effort.h"

namespace qcow::test {
namespace {

using Operation = Faults::Operation;

struct FaultCase {
    Work work;
    Operation operation = Operation::write;
};

void PrintTo(const FaultCase& c, std::ostream* out) { *out << c.work.name; }

constexpr unsigned steps = 40;

/// Everything that one thread does.
std::vector<Work> fault_works() {
    std::vector<Work> result;
    for (auto work : works()) {
        if ((work.threads > 1 && work.job == Work::Job::none) || work.full) continue;
        work.threads = 1;
        work.steps = std::min(work.steps, steps);
        work.kind.open.cache_bytes = 1;  // tables are read and written all the time
        work.kind.create.size = std::min(work.kind.create.size, std::uint64_t{512} << 10);
        result.push_back(std::move(work));
    }
    return result;
}

/// Under sanitizers each work meets one kind of fault: they look at the paths of errors, which all kinds lead to.
std::vector<FaultCase> fault_cases() {
    static constexpr std::array operations = {Operation::read, Operation::write, Operation::space, Operation::flush};
    std::vector<FaultCase> result;
    for (const auto& work : fault_works()) {
        const std::span<const Operation> all(operations);
        for (const auto operation : sanitized ? all.subspan(result.size() % all.size(), 1) : all)
            result.push_back({work, operation});
    }
    return result;
}

/// The same, each once; what takes no blocks cannot want any. The image stays open.
std::vector<FaultCase> full_cases() {
    std::vector<FaultCase> result;
    for (const auto& work : fault_works()) {
        if (!work.compact) result.push_back({work, Operation::space});
    }
    return result;
}

std::string name_of(const FaultCase& c) {
    static constexpr const char* names[] = {"read", "write", "space", "flush"};
    return fmt::format("{}_{}", c.work.name, names[static_cast<std::size_t>(c.operation)]);
}

FaultyRun::Setting setting_of(const ImageKind& kind, Random& random, const Mix& mix = {}) {
    const auto prepared = prepare(kind, random);
    return {.open = [kind](const Files& opened, bool writable) { return open_kind(kind, opened, writable); },
            .files = prepared.files,
            .sectors = kind.create.size / sector_bytes,
            .sectors_most = mix.resized_most,
            .discards_read_as_zeros = kind.discards_read_as_zeros(),
            .dirty = kind.dirty || mix.snapshot != 0,
            .kept = prepared.kept};
}

class FaultTest : public testing::TestWithParam<FaultCase> {};

TEST_P(FaultTest, NothingIsLostOrCorrupt) {
    const auto& [work, operation] = GetParam();
    auto random = Random::named(name_of(GetParam()));
    const auto setting = setting_of(work.kind, random, work.mix);
    SCOPED_TRACE(replay_hint());
    const auto perform_on = [&](FaultyRun& run) {
        Random same(run_seed());
        run.perform(work, same);
    };
    const auto count = fail_each(setting, operation, perform_on, rounds(6), random);
    EXPECT_GT(count, 0U);
    std::cout << "covered " << count << " faults\n";
}

INSTANTIATE_TEST_SUITE_P(Each, FaultTest, testing::ValuesIn(fault_cases()),
                         [](const auto& test) { return name_of(test.param); });

class FullTest : public testing::TestWithParam<FaultCase> {};

TEST_P(FullTest, OnlyWhatNeedsRoomFails) {
    const auto& work = GetParam().work;
    auto random = Random::named(work.name + " full");
    const auto setting = setting_of(work.kind, random, work.mix);
    SCOPED_TRACE(replay_hint());
    const auto perform_on = [&](FaultyRun& run) {
        Random same(run_seed());
        run.perform(work, same);
    };
    std::uint64_t count = 0;
    ASSERT_NO_THROW(count = fill_at_each(setting, perform_on, rounds(6), random));
    std::cout << "covered " << count << " full file systems in memory\n";
}

INSTANTIATE_TEST_SUITE_P(Each, FullTest, testing::ValuesIn(full_cases()),
                         [](const auto& test) { return test.param.work.name; });

/// Small, with tables that are read and written all the time.
ImageKind small_kind(const std::string& name) {
    auto kind = small(name, std::uint64_t{512} << 10);
    kind.open.cache_bytes = 1;
    return kind;
}

Mix mix_for(const ImageKind& kind) {
    return {.write = 10,
            .write_compressed = kind.can_compress() ? 1U : 0U,
            .zero = 3,
            .discard = 4,
            .flush = 4,
            .read = 2,
            .longest = 60};
}

/// Whoever waits for another thread is to learn that it failed.
class FaultyThreadsTest : public testing::TestWithParam<const char*> {};

TEST_P(FaultyThreadsTest, AllComeToAnEnd) {
    const auto kind = small_kind(GetParam());
    auto random = Random::named(kind.name);
    const auto setting = setting_of(kind, random);
    SCOPED_TRACE(replay_hint());
    // How far four threads come before the work ends is chance, and so is whether a fault strikes.
    const unsigned enough = (sanitized ? 4 : 9) * effort();
    unsigned struck = 0;
    for (unsigned round = 0; struck < enough; ++round) {
        ASSERT_LT(round, 20 * enough) << "only " << struck << " faults struck";
        const auto operation = random.pick({Operation::read, Operation::write, Operation::space, Operation::flush});
        FaultyRun run(setting);
        run.open();
        Faults::Fault fault{operation, random.below(operation == Operation::flush ? 10 : 60)};
        fault.times = random.pick({1, 5, 1'000'000});
        run.faults_for(operation).arm(fault);
        ASSERT_NO_THROW(run.work(mix_for(kind), steps, 4));
        run.close();
        struck += run.faults_for(operation).hits() != 0 ? 1 : 0;
        run.faults_for(operation).disarm();
        for (const auto& error : run.errors()) ASSERT_EQ(error.code, Errc::io) << error.message();
        const auto wrong = run.verdict(random);
        ASSERT_FALSE(wrong) << *wrong;
    }
    std::cout << "covered " << struck << " faults while four threads were at work\n";
}

INSTANTIATE_TEST_SUITE_P(Kinds, FaultyThreadsTest,
                         testing::Values("v3_512", "v3_4k", "extended_16k", "over_qcow2_longer_v3", "compressed_4k",
                                         "snapshot_4k", "data_file"),
                         [](const auto& test) { return std::string(test.param); });

class FullDiskTest : public testing::TestWithParam<const char*> {};

TEST_P(FullDiskTest, WorkGoesOnWhenThereIsRoomAgain) {
    const auto kind = small_kind(GetParam());
    auto random = Random::named(kind.name);
    const auto setting = setting_of(kind, random);
    const auto now = value_of(setting.files.at(image_name)->size());
    SCOPED_TRACE(replay_hint());
    const unsigned enough = 6 * effort();
    unsigned full = 0;
    for (unsigned round = 0; full < enough; ++round) {
        ASSERT_LT(round, 20 * enough) << "only " << full << " file systems were full";
        const auto room = now + random.below(std::uint64_t{200} << 10);
        SCOPED_TRACE(fmt::format("{} bytes", room));
        FaultyRun run(setting);
        run.open();
        run.faults->set_room(room);
        ASSERT_NO_THROW(run.work(mix_for(kind), steps));
        for (const auto& error : run.errors()) ASSERT_EQ(error.code, Errc::no_space) << error.message();
        run.faults->set_room(std::nullopt);
        full += run.hits() != 0 ? 1 : 0;
        const auto errors = run.errors().size();
        ASSERT_EQ(run.guest().failed_flushes(), 0U) << run.errors().back().message();
        ASSERT_NO_THROW(run.work(mix_for(kind), steps));
        const auto unread = run.guest().verify(0, run.guest().sectors());
        ASSERT_FALSE(unread) << *unread;
        run.close();
        ASSERT_EQ(run.errors().size(), errors) << run.errors().back().message();
        const auto wrong = run.verdict(random);
        ASSERT_FALSE(wrong) << *wrong;
        ASSERT_EQ(run.leaks(), 0U);
    }
}

INSTANTIATE_TEST_SUITE_P(Kinds, FullDiskTest,
                         testing::Values("v3_512", "v3_4k", "v2_4k", "extended_16k", "over_qcow2_longer_v3",
                                         "compressed_4k", "snapshot_4k", "lazy"),
                         [](const auto& test) { return std::string(test.param); });

}  // namespace
}  // namespace qcow::test
