// Every operation of Storage fails in turn: the request that it belongs to says so, nothing becomes corrupt, and what
// was flushed is there when the image is opened again, with and without a power loss.

#include <gtest/gtest.h>

#include "engine/faulty_run.h"
#include "engine/image_kinds.h"
#include "support/effort.h"

namespace qcow::test {
namespace {

using Operation = Faults::Operation;

struct FaultCase {
    std::string name;
    std::string kind;
    Operation operation = Operation::write;
};

void PrintTo(const FaultCase& c, std::ostream* out) { *out << c.name; }

std::vector<FaultCase> fault_cases() {
    std::vector<FaultCase> result;
    for (const auto* kind : {"v3_512", "v3_4k", "v2_4k", "extended_16k", "over_qcow2_longer_v3", "compressed_4k",
                             "snapshot_4k", "data_file", "lazy", "refcounts_1"}) {
        const std::string name = kind;
        result.push_back({name + "_read", kind, Operation::read});
        result.push_back({name + "_write", kind, Operation::write});
        result.push_back({name + "_space", kind, Operation::space});
        result.push_back({name + "_flush", kind, Operation::flush});
    }
    return result;
}

constexpr unsigned steps = 40;

ImageKind small_kind(const std::string& name) {
    for (auto kind : image_kinds()) {
        if (kind.name != name) continue;
        kind.create.size = std::uint64_t{512} << 10;
        kind.open.cache_bytes = 1;  // tables are read and written all the time
        return kind;
    }
    throw std::runtime_error("no kind " + name);
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

std::unique_ptr<FaultyRun> begin(const ImageKind& kind, const Files& files) {
    const Opener open = [kind](const Files& opened, bool writable) { return open_kind(kind, opened, writable); };
    return std::make_unique<FaultyRun>(open, files, kind.create.size, kind.discards_read_as_zeros());
}

class FaultTest : public testing::TestWithParam<FaultCase> {};

TEST_P(FaultTest, NothingIsLostOrCorrupt) {
    const auto& c = GetParam();
    const auto kind = small_kind(c.kind);
    auto random = Random::named(c.name);
    const auto files = prepare(kind, random).files;
    SCOPED_TRACE(replay_hint());
    const auto count =
        fail_each([&] { return begin(kind, files); }, c.operation, mix_for(kind), steps, 60 * effort(), random);
    std::cout << "covered " << count << " faults\n";
}

INSTANTIATE_TEST_SUITE_P(Each, FaultTest, testing::ValuesIn(fault_cases()),
                         [](const auto& test) { return test.param.name; });

/// Whoever waits for another thread is to learn that it failed.
class FaultyThreadsTest : public testing::TestWithParam<const char*> {};

TEST_P(FaultyThreadsTest, AllComeToAnEnd) {
    const auto kind = small_kind(GetParam());
    auto random = Random::named(kind.name);
    const auto files = prepare(kind, random).files;
    SCOPED_TRACE(replay_hint());
    unsigned struck = 0;
    for (unsigned i = 0; i < 24 * effort(); ++i) {
        const auto operation = random.pick({Operation::read, Operation::write, Operation::space, Operation::flush});
        const auto run = begin(kind, files);
        Faults::Fault fault{operation, random.below(operation == Operation::flush ? 10 : 60)};
        fault.times = random.pick({1, 5, 1'000'000});
        run->faults_for(operation).arm(fault);
        ASSERT_NO_THROW(run->work(mix_for(kind), steps, 4));
        run->close();
        struck += run->faults_for(operation).hits() != 0 ? 1 : 0;
        run->faults_for(operation).disarm();
        for (const auto& error : run->errors()) ASSERT_EQ(error.code, Errc::io) << error.message();
        const auto wrong = run->verdict(random);
        ASSERT_FALSE(wrong) << *wrong;
    }
    EXPECT_GT(struck, 8 * effort());
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
    const auto files = prepare(kind, random).files;
    const auto now = value_of(files.at(image_name)->size());
    SCOPED_TRACE(replay_hint());
    for (unsigned i = 0; i < 10 * effort(); ++i) {
        const auto room = now + random.below(std::uint64_t{200} << 10);
        SCOPED_TRACE(fmt::format("{} bytes", room));
        const auto run = begin(kind, files);
        run->faults->set_room(room);
        ASSERT_NO_THROW(run->work(mix_for(kind), steps));
        for (const auto& error : run->errors()) ASSERT_EQ(error.code, Errc::no_space) << error.message();
        run->faults->set_room(std::nullopt);
        const auto errors = run->errors().size();
        ASSERT_NO_THROW(run->work(mix_for(kind), steps));
        const auto unread = run->guest().verify(0, run->guest().sectors());
        ASSERT_FALSE(unread) << *unread;
        run->close();
        ASSERT_EQ(run->errors().size(), errors) << run->errors().back().message();
        const auto wrong = run->verdict(random);
        ASSERT_FALSE(wrong) << *wrong;
    }
}

INSTANTIATE_TEST_SUITE_P(Kinds, FullDiskTest,
                         testing::Values("v3_512", "v3_4k", "v2_4k", "extended_16k", "over_qcow2_longer_v3",
                                         "compressed_4k", "snapshot_4k", "lazy"),
                         [](const auto& test) { return std::string(test.param); });

}  // namespace
}  // namespace qcow::test
