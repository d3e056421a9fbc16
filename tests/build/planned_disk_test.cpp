#include "build/planned_disk.h"

#include <gtest/gtest.h>
#include <sys/stat.h>

#include <map>
#include <string>

#include "base/bits.h"
#include "support/bytes.h"
#include "support/random.h"
#include "support/result.h"
#include "support/temporary_directory.h"

namespace qcow {
namespace {

using namespace qcow::test;

class Letters final : public Contents {
public:
    Result<void> read(std::uint64_t at, std::span<std::byte> to) const override {
        for (std::size_t i = 0; i < to.size(); ++i) to[i] = static_cast<std::byte>('a' + (at + i) % 26);
        return {};
    }
};

/// What was written and placed is read again, with any budget, and extents say where it is.
TEST(PlannedDisk, ReadsWhatWasWrittenAndPlaced) {
    constexpr std::uint64_t size = 1 << 20;
    const Letters letters;
    for (const std::size_t budget : {std::size_t{0}, std::size_t{20000}, PlannedDisk::default_budget}) {
        PlannedDisk disk(size, budget);
        Bytes model(size);
        Random random(3);
        std::uint64_t at = 0;
        while (at + 20000 < size) {
            const auto length = (1 + random.below(30)) * 512;
            const auto piece = std::span(model).subspan(at, length);
            switch (random.below(3)) {
                case 0:
                    std::ranges::fill(piece, static_cast<std::byte>(1 + random.below(255)));
                    must(disk.write({at}, piece));
                    break;
                case 1: {
                    const auto bytes = length - random.below(512);
                    must(letters.read(7, piece.first(bytes)));
                    disk.place({at}, bytes, letters, 7);
                    break;
                }
                default: break;
            }
            at += length;
        }
        disk.seal();
        Bytes read(size);
        must(disk.read({0}, read));
        EXPECT_TRUE(read == model);
        for (unsigned i = 0; i < 200; ++i) {
            const auto begin = random.below(size);
            const auto length = 1 + random.below(std::min<std::uint64_t>(size - begin, 30000));
            Bytes part(length);
            must(disk.read({begin}, part));
            EXPECT_TRUE(std::ranges::equal(part, std::span(model).subspan(begin, length)));
            const auto extent = must(disk.extent({begin}, length));
            EXPECT_LE(extent.length, length);
            EXPECT_TRUE(extent.kind == Extent::Kind::data || is_zero(std::span(model).subspan(begin, extent.length)));
        }
    }
}

TEST(Tree, AFileThatChangesWhileItIsReadIsAnError) {
    const TemporaryDirectory directory;
    write_file(directory / "kept", "contents");
    write_file(directory / "changed", "contents");
    write_file(directory / "gone", "contents");
    auto tree = must(tree_of_directory(directory.path()));
    write_file(directory / "changed", "other contents");
    std::filesystem::remove(directory.path() / "gone");
    Bytes to(8);
    EXPECT_TRUE(tree.find("kept")->content->read(0, to));
    EXPECT_TRUE(fails(tree.find("changed")->content->read(0, to), Errc::io, {"changed", "build it again"}));
    EXPECT_TRUE(fails(tree.find("gone")->content->read(0, to), Errc::io, {"gone", "vanished"}));
}

/// Names come in any order and go again, as in a map.
TEST(Tree, ADirectoryIsSorted) {
    Tree tree;
    std::map<std::string, TreeInode*> model;
    Random random(5);
    for (unsigned i = 0; i < 20000; ++i) {
        const auto name = std::string(random.below(3), '\xff') + std::to_string(random.below(4000));
        if (random.below(3) == 0) {
            EXPECT_EQ(tree.remove(name), model.erase(name) != 0);
        } else {
            auto& place = *must(tree.place(name));
            EXPECT_EQ(place, model.contains(name) ? model.at(name) : nullptr);
            place = model[name] = &tree.new_inode(S_IFREG | 0644);
        }
    }
    const auto& children = *tree.root().children;
    EXPECT_EQ(children.size(), model.size());
    auto expected = model.begin();
    for (const auto& [name, inode] : children.entries()) {
        ASSERT_NE(expected, model.end());
        EXPECT_EQ(name.text(), expected->first);
        EXPECT_EQ(inode, expected->second);
        EXPECT_EQ(children.find(name.text()), inode);
        ++expected;
    }
    EXPECT_EQ(expected, model.end());
    EXPECT_EQ(children.find("no such name"), nullptr);
}

TEST(Tree, PathsStayWithinIt) {
    Tree tree;
    EXPECT_TRUE(fails(tree.place("a/../b"), Errc::refused_by_policy));
    EXPECT_TRUE(fails(tree.place(std::string(256, 'x')), Errc::invalid_argument));
    *must(tree.place("link")) = &tree.new_inode(S_IFLNK | 0777);
    EXPECT_TRUE(fails(tree.place("link/below"), Errc::invalid_argument, {"links are not followed"}));
}

}  // namespace
}  // namespace qcow
