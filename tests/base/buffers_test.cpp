#include "base/buffers.h"

#include <gtest/gtest.h>

#include <array>

#include "support/bytes.h"

namespace qcow {
namespace {

using namespace qcow::test;

/// Three pieces with "abc", nothing, and "defgh".
class BuffersTest : public testing::Test {
protected:
    Bytes abc_ = text_bytes("abc");
    Bytes defgh_ = text_bytes("defgh");
    std::array<std::span<const std::byte>, 3> pieces_ = {abc_, {}, defgh_};
    ConstBuffers all_ = ConstBuffers(pieces_);
};

std::vector<std::string> pieces_of(ConstBuffers buffers) {
    std::vector<std::string> pieces;
    for (const auto piece : buffers) pieces.emplace_back(reinterpret_cast<const char*>(piece.data()), piece.size());
    return pieces;
}

using Pieces = std::vector<std::string>;

TEST_F(BuffersTest, BytesInOnePieceAreAListOfOne) {
    const ConstBuffers one = abc_;
    EXPECT_EQ(one.size(), 3U);
    EXPECT_TRUE(one.contiguous());
    EXPECT_EQ(one.front().data(), abc_.data());
    EXPECT_EQ(pieces_of(one), Pieces{"abc"});
    EXPECT_EQ(pieces_of({abc_.data(), 2}), Pieces{"ab"});
}

TEST_F(BuffersTest, NothingIsAnEmptyList) {
    for (const auto nothing : {ConstBuffers(), ConstBuffers(Bytes()), all_.first(0), all_.subspan(8)}) {
        EXPECT_TRUE(nothing.empty());
        EXPECT_TRUE(nothing.contiguous());
        EXPECT_TRUE(nothing.front().empty());
        EXPECT_EQ(pieces_of(nothing), Pieces());
    }
    const std::array<std::span<const std::byte>, 2> empty = {};
    EXPECT_EQ(pieces_of(ConstBuffers(empty)), Pieces());
}

TEST_F(BuffersTest, EmptyPiecesAreLeftOut) {
    EXPECT_EQ(all_.size(), 8U);
    EXPECT_FALSE(all_.contiguous());
    EXPECT_EQ(pieces_of(all_), (Pieces{"abc", "defgh"}));
    const std::array<std::span<const std::byte>, 2> begins_empty = {std::span<const std::byte>(), abc_};
    EXPECT_EQ(pieces_of(ConstBuffers(begins_empty)), Pieces{"abc"});
}

TEST_F(BuffersTest, CutsAnywhere) {
    const std::string text = "abcdefgh";
    for (std::size_t begin = 0; begin <= text.size(); ++begin) {
        for (std::size_t length = 0; begin + length <= text.size(); ++length) {
            const auto part = all_.subspan(begin, length);
            EXPECT_EQ(part.size(), length);
            std::string joined;
            for (const auto& piece : pieces_of(part)) joined += piece;
            EXPECT_EQ(joined, text.substr(begin, length));
            EXPECT_EQ(gathered(part), text_bytes(joined));
            EXPECT_EQ(part.contiguous(), length == 0 || begin >= 3 || begin + length <= 3);
        }
    }
}

TEST_F(BuffersTest, CopiesBetweenListsAndOnePiece) {
    const std::array<std::span<std::byte>, 2> pieces = {std::span(abc_), std::span(defgh_)};
    const Buffers to(pieces);
    scatter(text_bytes("1234"), to);
    EXPECT_EQ(gathered(all_), text_bytes("1234efgh"));
    fill_zeros(to.subspan(2));
    EXPECT_EQ(gathered(all_), joined({text_bytes("12"), Bytes(6)}));
    EXPECT_FALSE(all_zeros(all_));
    EXPECT_TRUE(all_zeros(all_.subspan(2)));
    defgh_.back() = std::byte{1};
    EXPECT_FALSE(all_zeros(all_.subspan(2)));
}

}  // namespace
}  // namespace qcow
