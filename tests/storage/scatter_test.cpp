// Every Storage takes memory in pieces, and does with it what it does with memory in one piece.

#include <gtest/gtest.h>

#include "base/bits.h"
#include "storage/direct.h"
#include "storage/growing.h"
#include "support/bytes.h"
#include "support/effort.h"
#include "support/result.h"
#include "support/scattered.h"
#include "support/temporary_directory.h"

namespace qcow {
namespace {

using namespace qcow::test;

constexpr std::uint64_t most_bytes = 64 * KiB;

/// Random reads and writes, in up to `pieces` pieces, against an array.
void exercise(Storage& storage, const std::string& name, std::size_t pieces) {
    auto random = Random::named(name);
    Bytes expected;
    for (unsigned i = 0; i < 200 * effort(); ++i) {
        const auto at = random.below(most_bytes);
        Bytes bytes = text_bytes(random.bytes(random.below(most_bytes / 4)));
        if (random.chance(50)) {
            const auto cut = cut_up(std::span<const std::byte>(bytes), random, pieces);
            must(storage.write({at}, ConstBuffers(cut)));
            if (bytes.empty()) continue;
            expected.resize(std::max<std::size_t>(expected.size(), at + bytes.size()));
            std::ranges::copy(bytes, expected.begin() + static_cast<std::ptrdiff_t>(at));
        } else {
            const auto there = std::min<std::uint64_t>(expected.size() - std::min(at, expected.size()), bytes.size());
            Bytes wanted(expected.begin() + static_cast<std::ptrdiff_t>(std::min(at, expected.size())),
                         expected.begin() + static_cast<std::ptrdiff_t>(std::min(at, expected.size()) + there));
            wanted.resize(bytes.size());
            const auto cut = cut_up(std::span(bytes), random, pieces);
            ASSERT_EQ(must(storage.read({at}, Buffers(cut))), there) << replay_hint();
            ASSERT_EQ(bytes, wanted) << replay_hint();
        }
    }
}

TEST(ScatterTest, Memory) { exercise(*memory_storage(), "scatter/memory", 7); }

TEST(ScatterTest, Files) {
    const TemporaryDirectory directory;
    write_file(directory / "disk", "");
    const auto file = must(open_file(directory / "disk", {.writable = true}));
    exercise(*file, "scatter/file", 7);
}

TEST(ScatterTest, MorePiecesThanOneSystemCallTakes) {
    const TemporaryDirectory directory;
    write_file(directory / "disk", "");
    const auto file = must(open_file(directory / "disk", {.writable = true}));
    exercise(*file, "scatter/many", 2000);
}

TEST(ScatterTest, DirectFiles) {
    exercise(*direct_storage(memory_storage(), {.block = 512, .memory = 512}), "scatter/direct", 7);
}

TEST(ScatterTest, DevicesThatAreTakenForFiles) {
    const auto device = memory_storage(Bytes(2 * most_bytes, std::byte{7}));
    exercise(*must(as_empty(device)), "scatter/growing", 7);
}

}  // namespace
}  // namespace qcow
