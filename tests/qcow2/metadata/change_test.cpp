#include "qcow2/metadata/change.h"

#include <gtest/gtest.h>

#include "qcow2/image_check.h"
#include "qcow2/open_parts.h"

namespace qcow::test {
namespace {

using qcow2::Barrier;
using qcow2::Change;
using qcow2::MetadataMap;

class ChangeTest : public testing::Test {
protected:
    /// Everything given back, as a close does: the leaks that are left.
    std::uint64_t leaks() {
        must(open_.metadata->flush());
        must(open_.metadata->give_back());
        const auto report = must(qcow2::check_image(open_.parts->metadata, nullptr, {}));
        EXPECT_EQ(report.corruptions + report.errors, 0U);
        return report.leaks;
    }

    OpenParts open_;
};

TEST_F(ChangeTest, WithoutACommitWhatItTookIsGivenBack) {
    {
        Change change(*open_.metadata);
        EXPECT_GE(must(change.take(0, 3)).count, 1U);
        must(change.take_table(MetadataMap::Kind::l2_table));
        must(change.take_table(MetadataMap::Kind::l1_table, 2));
        must(change.take_stream(1000));
    }
    EXPECT_EQ(leaks(), 0U);
}

TEST_F(ChangeTest, ATableIsKnownAsMetadataUntilItIsGivenBack) {
    HostOffset table;
    {
        Change change(*open_.metadata);
        table = must(change.take_table(MetadataMap::Kind::l2_table));
    }
    EXPECT_FALSE(open_.metadata->verify_no_metadata(table, 512));
}

TEST_F(ChangeTest, ACommitMakesItVisibleAndFreesWhatItReplaced) {
    for (int round = 0; round < 3; ++round) {
        const auto guard = open_.mapping->lock({0, 1});
        const auto old = must(open_.mapping->load({0, 1}));
        Change change(*open_.metadata);
        const auto run = must(change.take(0, 1));
        const format::L2Entry entry{run.first * 4096 | format::copied_bit};
        must(open_.mapping->replace(change, 0, old, {&entry, 1}, Barrier::none));
        EXPECT_EQ(must(open_.view->lookup({0}, 4096)).host, HostOffset{run.first * 4096});
    }
    EXPECT_EQ(leaks(), 0U);
}

TEST_F(ChangeTest, AMovedChangeGivesBackOnce) {
    {
        Change first(*open_.metadata);
        must(first.take(0, 1));
        Change second(std::move(first));
        Change third(*open_.metadata);
        third = std::move(second);
    }
    EXPECT_EQ(leaks(), 0U);
}

TEST_F(ChangeTest, TheHeaderIsChangedDurably) {
    const auto flushes = open_.file->flushes.load();
    Change change(*open_.metadata);
    must(change.commit_header([](format::HeaderState& state) { state.size += 512; }));
    EXPECT_EQ(open_.parts->metadata.state().size, (std::uint64_t{1} << 20) + 512);
    Bytes cluster(4096);
    must(open_.file->read({0}, cluster));
    EXPECT_EQ(must(format::parse_header(cluster)).size, (std::uint64_t{1} << 20) + 512);
    EXPECT_EQ(open_.file->flushes, flushes + 1);
}

TEST_F(ChangeTest, EntriesReplaceOnlyPlacesThatTheyDoNotKeep) {
    std::vector<format::L2Entry> entries;
    const auto guard = open_.mapping->lock({0, 2});
    {
        const auto old = must(open_.mapping->load({0, 2}));
        Change change(*open_.metadata);
        for (std::uint64_t i = 0; i < 2; ++i)
            entries.push_back({must(change.take(i, 1)).first * 4096 | format::copied_bit});
        must(open_.mapping->replace(change, 0, old, entries, Barrier::none));
    }
    Change change(*open_.metadata);
    const std::vector<format::L2Entry> zeros = {{entries[0].word | format::zero_bit}, {format::zero_bit}};
    must(open_.mapping->replace(change, 0, entries, zeros, Barrier::none));
    EXPECT_EQ(leaks(), 0U);
    EXPECT_EQ(must(open_.view->lookup({0}, 4096)).kind, format::ClusterKind::zero_allocated);
    EXPECT_EQ(must(open_.view->lookup({4096}, 4096)).kind, format::ClusterKind::zero);
}

}  // namespace
}  // namespace qcow::test
