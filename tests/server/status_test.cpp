// What clients learn of holes: as parts of reads, and by asking.

#include <gmock/gmock.h>

#include <map>

#include "server/running_server.h"

namespace qcow::test {
namespace {

using nbd::Command;
using nbd::Style;
using testing::ElementsAre;
using testing::IsEmpty;
using testing::SizeIs;
namespace flag = nbd::command_flag;

constexpr std::uint64_t block = TestDisk::block;

struct Stretch {
    std::uint64_t length;
    std::uint64_t flags;
    bool operator==(const Stretch&) const = default;
};
void PrintTo(const Stretch& run, std::ostream* out) { *out << "{" << run.length << ", " << run.flags << "}"; }

/// Blocks 0 to 31, of which 2 and 10 to 19 are holes.
class Status : public testing::TestWithParam<Style> {
protected:
    Status() {
        disk_->fill(random_);
        disk_->punch(2 * block);
        for (std::uint64_t i = 10; i < 20; ++i) disk_->punch(i * block);
        client_.go(GetParam(), {"base:allocation", "test:thousands", "qemu:allocation-depth"});
    }

    std::vector<NbdExport> exports() {
        NbdExport exported{"", "", disk_, false, true};
        exported.contexts.push_back(
            {"test:thousands", [](GuestOffset at, std::uint64_t length, const auto& visit) -> Result<void> {
                 if (at.value == 77) return fail(Errc::io, "context", "out of order");
                 for (const auto end = at + length; at < end;) {
                     const auto run = std::min(end - at, 1000 - at.value % 1000);
                     if (!visit({run, static_cast<std::uint32_t>(at.value / 1000)})) break;
                     at += run;
                 }
                 return {};
             }});
        return {exported};
    }

    struct Answer {
        std::map<std::uint32_t, std::vector<Stretch>> runs;
        std::uint32_t error = 0;
    };

    Answer answer() {
        Answer result;
        const bool extended = GetParam() == Style::extended;
        for (;;) {
            const auto chunk = client_.chunk();
            if (chunk.error != 0) {
                result.error = chunk.error;
            } else {
                EXPECT_EQ(chunk.type, extended ? nbd::chunk_type::block_status_ext : nbd::chunk_type::block_status);
                auto& runs = result.runs[load_be<std::uint32_t>(chunk.data, 0)];
                const std::span<const std::byte> data(chunk.data);
                if (extended) {
                    EXPECT_EQ(load_be<std::uint32_t>(data, 4), (data.size() - 8) / 16);
                }
                for (std::size_t at = extended ? 8 : 4; at < data.size(); at += extended ? 16 : 8) {
                    runs.push_back(
                        extended ? Stretch{load_be<std::uint64_t>(data, at), load_be<std::uint64_t>(data, at + 8)}
                                 : Stretch{load_be<std::uint32_t>(data, at), load_be<std::uint32_t>(data, at + 4)});
                }
            }
            if (chunk.done) return result;
        }
    }

    Answer status(std::uint64_t at, std::uint64_t length, std::uint16_t flags = 0) {
        client_.send(client_.request(Command::block_status, at, length, flags));
        return answer();
    }

    Random random_ = Random::named("status");
    std::shared_ptr<TestDisk> disk_ = std::make_shared<TestDisk>(32 * block);
    RunningServer server_{exports()};
    NbdClient client_{server_.socket()};
};

INSTANTIATE_TEST_SUITE_P(Styles, Status, testing::Values(Style::structured, Style::extended));

TEST_P(Status, AllContextsAtOnce) {
    const auto all = status(block, 3 * block).runs;
    ASSERT_THAT(all, SizeIs(3));
    EXPECT_THAT(all.at(0), ElementsAre(Stretch{block, 0}, Stretch{block, 3}, Stretch{block, 0}));
    // The test disk says that its odd blocks come from the layer below.
    EXPECT_THAT(all.at(1), ElementsAre(Stretch{block, 2}, Stretch{block, 0}, Stretch{block, 2}));
    EXPECT_EQ(all.at(2).size(), 198U);
    EXPECT_EQ(all.at(2)[0], (Stretch{464, 65}));
    EXPECT_EQ(all.at(2)[1], (Stretch{1000, 66}));
}

TEST_P(Status, NeighboursThatAreAlikeAreOne) {
    const auto runs = status(0, 32 * block).runs.at(0);
    EXPECT_THAT(runs, ElementsAre(Stretch{2 * block, 0}, Stretch{block, 3}, Stretch{7 * block, 0},
                                  Stretch{10 * block, 3}, Stretch{12 * block, 0}));
}

TEST_P(Status, PartsOfBlocks) {
    EXPECT_THAT(status(2 * block - 10, 20).runs.at(0), ElementsAre(Stretch{10, 0}, Stretch{10, 3}));
    EXPECT_THAT(status(32 * block - 1, 1).runs.at(0), ElementsAre(Stretch{1, 0}));
}

TEST_P(Status, OneRunOnly) {
    EXPECT_THAT(status(15 * block, 17 * block, flag::req_one).runs.at(0), ElementsAre(Stretch{5 * block, 3}));
}

TEST_P(Status, WhatMakesNoSense) {
    EXPECT_EQ(status(0, 0).error, 22U);
    EXPECT_EQ(status(32 * block, 1).error, 22U);
    EXPECT_EQ(status(31 * block, block + 1).error, 22U);
    EXPECT_EQ(status(77, 100).error, 5U);
    EXPECT_EQ(status(0, 100).error, 0U);
}

TEST_P(Status, ChosenContexts) {
    const auto ask = [&](const Wire& payload) {
        client_.send(client_.request(Command::block_status, 0, payload.bytes.size(), flag::payload_length)
                     << payload.bytes);
        return answer();
    };
    const std::uint64_t length = 4 * block;
    if (GetParam() != Style::extended) {
        client_.send(client_.request(Command::block_status, 0, 12, flag::payload_length));
        EXPECT_EQ(answer().error, 22U);
        return;
    }
    EXPECT_THAT(
        ask(Wire() << length << 0U).runs,
        ElementsAre(testing::Pair(0U, ElementsAre(Stretch{2 * block, 0}, Stretch{block, 3}, Stretch{block, 0}))));
    EXPECT_THAT(ask(Wire() << length << 1U << 0U).runs, SizeIs(2));
    EXPECT_EQ(ask(Wire() << length << 3U).error, 22U);
    EXPECT_EQ(ask(Wire() << length).error, 22U);
    EXPECT_EQ(ask(Wire() << length << 1U << std::uint16_t{0}).error, 22U);
    EXPECT_EQ(ask(Wire() << 33 * block << 0U).error, 22U);
    EXPECT_EQ(ask(Wire() << ~std::uint64_t{0} << 0U).error, 22U);
    EXPECT_EQ(ask(Wire() << std::uint64_t{0} << 0U).error, 22U);
    EXPECT_EQ(ask(Wire() << length << std::string(4 * 65, '\0')).error, 22U);
    EXPECT_THAT(ask(Wire() << length << 0U).runs, SizeIs(1));
}

TEST_P(Status, HolesOfReads) {
    const auto whole = client_.read(0, 32 * block);
    EXPECT_TRUE(std::ranges::equal(whole.bytes, disk_->bytes()));
    EXPECT_EQ(whole.holes, 2U);
    const auto hole = client_.read(10 * block, 10 * block);
    EXPECT_EQ(hole.holes, 1U);
    EXPECT_EQ(hole.data_chunks, 0U);
    EXPECT_TRUE(hole.bytes == Bytes(10 * block));
    // Too little for it to be worth asking.
    EXPECT_EQ(client_.read(10 * block, 512).holes, 0U);
}

TEST_P(Status, AHoleThatIsWrittenIsOneNoLonger) {
    EXPECT_EQ(client_.read(9 * block, 3 * block).holes, 1U);
    const auto text = random_.bytes(block);
    EXPECT_EQ(client_.write(11 * block, as_bytes(text)), 0U);
    const auto read = client_.read(9 * block, 3 * block);
    EXPECT_TRUE(std::ranges::equal(read.bytes, disk_->bytes().subspan(9 * block, 3 * block)));
}

TEST_P(Status, AReadInOnePiece) {
    const auto read = client_.read(block, 3 * block, flag::df);
    EXPECT_EQ(read.data_chunks, 1U);
    EXPECT_EQ(read.holes, 0U);
    EXPECT_TRUE(std::ranges::equal(read.bytes, disk_->bytes().subspan(block, 3 * block)));
    EXPECT_EQ(client_.read(100, 256 * KiB, flag::df).data_chunks, 1U);
    EXPECT_EQ(client_.read(0, 256 * KiB + 1, flag::df).error, 75U);
}

}  // namespace
}  // namespace qcow::test
