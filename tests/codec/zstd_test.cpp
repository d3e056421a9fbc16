#include <zstd.h>

#include <gtest/gtest.h>
#include <malloc.h>

#include <stdexcept>
#include <thread>
#include <vector>

#include "codec/codec.h"
#include "support/bytes.h"
#include "support/result.h"
#include "support/sample.h"

namespace qcow::codec {
namespace {

using namespace qcow::test;

struct FrameOptions {
    int level = 3;
    bool content_size = true;
    bool checksum = false;
};

Bytes compressed(const Bytes& in, const FrameOptions& options = {}) {
    ZSTD_CCtx* context = ZSTD_createCCtx();
    ZSTD_CCtx_setParameter(context, ZSTD_c_compressionLevel, options.level);
    ZSTD_CCtx_setParameter(context, ZSTD_c_contentSizeFlag, options.content_size ? 1 : 0);
    ZSTD_CCtx_setParameter(context, ZSTD_c_checksumFlag, options.checksum ? 1 : 0);
    Bytes out(ZSTD_compressBound(in.size()));
    const std::size_t size = ZSTD_compress2(context, out.data(), out.size(), in.data(), in.size());
    ZSTD_freeCCtx(context);
    if (ZSTD_isError(size) != 0) throw std::runtime_error(ZSTD_getErrorName(size));
    out.resize(size);
    return out;
}

Bytes decompressed(const Bytes& in, std::size_t size) {
    Bytes out = repeated(size, 0xee);
    must(decompress_zstd(in, out));
    return out;
}

Result<void> try_decompress(const Bytes& in, std::size_t size) {
    Bytes out(size);
    return decompress_zstd(in, out);
}

// ---- Literal frames (RFC 8878) ----

const Bytes frame_magic = bytes({0x28, 0xb5, 0x2f, 0xfd});

/// Frame header without a content size; the window has 1 KiB << `log`.
Bytes window_descriptor(std::uint8_t log) { return bytes({0x00, static_cast<std::uint8_t>(log << 3)}); }

/// A block header: 3 bytes, the least significant one first. Type 0 is raw, 1 is one byte repeated.
Bytes block_header(bool last, unsigned type, std::uint32_t size) {
    const std::uint32_t n = size << 3 | type << 1 | (last ? 1 : 0);
    return bytes({static_cast<std::uint8_t>(n), static_cast<std::uint8_t>(n >> 8), static_cast<std::uint8_t>(n >> 16)});
}
Bytes raw_block(bool last, const Bytes& data) {
    return joined({block_header(last, 0, static_cast<std::uint32_t>(data.size())), data});
}

TEST(Zstd, ARawBlock) {
    const auto in = joined({frame_magic, window_descriptor(0), raw_block(true, text_bytes("hello"))});
    EXPECT_EQ(decompressed(in, 5), text_bytes("hello"));
}

TEST(Zstd, SeveralBlocks) {
    const auto in = joined({frame_magic, window_descriptor(0), raw_block(false, text_bytes("hello")),
                            block_header(true, 1, 3), text_bytes("!")});
    EXPECT_EQ(decompressed(in, 8), text_bytes("hello!!!"));
}

// ---- Round trips ----

TEST(Zstd, UndoesCompressionForTheSmallestAndTheLargestClusters) {
    EXPECT_EQ(decompressed(compressed(sample(512)), 512), sample(512));
    EXPECT_EQ(decompressed(compressed(sample(65536)), 65536), sample(65536));
    EXPECT_EQ(decompressed(compressed(sample(2 << 20)), 2 << 20), sample(2 << 20));
}

TEST(Zstd, UndoesCompressionAtTheFirstAndTheLastLevel) {
    EXPECT_EQ(decompressed(compressed(sample(65536), {.level = 1}), 65536), sample(65536));
    EXPECT_EQ(decompressed(compressed(sample(2 << 20), {.level = 22}), 2 << 20), sample(2 << 20));
}

TEST(Zstd, UndoesCompressionOfZeros) {
    EXPECT_EQ(decompressed(compressed(repeated(65536, 0)), 65536), repeated(65536, 0));
}

TEST(Zstd, NeedsNoContentSize) {
    EXPECT_EQ(decompressed(compressed(sample(65536), {.content_size = false}), 65536), sample(65536));
}

TEST(Zstd, TakesAChecksum) {
    EXPECT_EQ(decompressed(compressed(sample(65536), {.checksum = true}), 65536), sample(65536));
}

TEST(Zstd, TakesSeveralFrames) {
    const auto in = joined({compressed(sample(30000, 1)), compressed(sample(35536, 2))});
    EXPECT_EQ(decompressed(in, 65536), joined({sample(30000, 1), sample(35536, 2)}));
}

TEST(Zstd, SkipsSkippableFrames) {
    const auto skippable = bytes({0x50, 0x2a, 0x4d, 0x18, 0x03, 0x00, 0x00, 0x00, 0xaa, 0xbb, 0xcc});
    EXPECT_EQ(decompressed(joined({skippable, compressed(sample(65536))}), 65536), sample(65536));
}

// ---- What follows the frame, and what there is too much of it ----

TEST(Zstd, IgnoresWhatFollowsTheFrame) {
    const auto frame = compressed(sample(65536));
    EXPECT_EQ(decompressed(joined({frame, repeated(511, 0xff)}), 65536), sample(65536));
    EXPECT_EQ(decompressed(joined({frame, repeated(1, 0)}), 65536), sample(65536));
    EXPECT_EQ(decompressed(joined({frame, compressed(sample(65536, 9))}), 65536), sample(65536));
}

TEST(Zstd, IgnoresWhatFollowsTheLastOfSeveralFrames) {
    const auto in = joined({compressed(sample(30000, 1)), compressed(sample(35536, 2)), repeated(100, 0xff)});
    EXPECT_EQ(decompressed(in, 65536), joined({sample(30000, 1), sample(35536, 2)}));
}

TEST(Zstd, StopsWhenTheClusterIsFull) {
    const auto data = sample(2 * 65536);
    EXPECT_EQ(decompressed(compressed(data), 65536), first(data, 65536));
    EXPECT_EQ(decompressed(compressed(data), data.size() - 1), first(data, data.size() - 1));
    EXPECT_EQ(decompressed(compressed(data, {.content_size = false}), 65536), first(data, 65536));
}

TEST(Zstd, WritesNothingPastTheCluster) {
    Bytes out = repeated(1000 + 64, 0xee);
    must(decompress_zstd(compressed(repeated(65536, 0x61)), std::span(out).first(1000)));
    EXPECT_EQ(out, joined({repeated(1000, 0x61), repeated(64, 0xee)}));
}

// ---- Damage ----

TEST(Zstd, AFrameThatEndsEarlyIsDamaged) {
    EXPECT_TRUE(fails(try_decompress(compressed(sample(65535)), 65536), Errc::corrupt,
                      {"zstd stream: it ends before the cluster is full"}));
    EXPECT_TRUE(fails(try_decompress(compressed({}), 65536), Errc::corrupt, {"zstd stream"}));
}

TEST(Zstd, AFrameThatIsCutShortIsDamaged) {
    const auto frame = compressed(sample(65536));
    EXPECT_TRUE(fails(try_decompress(first(frame, frame.size() / 2), 65536), Errc::corrupt, {"zstd stream"}));
    EXPECT_TRUE(fails(try_decompress(first(frame, 3), 65536), Errc::corrupt, {"zstd stream"}));
    EXPECT_TRUE(fails(try_decompress({}, 65536), Errc::corrupt, {"zstd stream"}));
}

TEST(Zstd, AnotherMagicIsDamage) {
    EXPECT_TRUE(fails(try_decompress(with_u8(compressed(sample(512)), 0, 0x29), 512), Errc::corrupt, {"zstd stream"}));
    EXPECT_TRUE(fails(try_decompress(repeated(512, 0), 512), Errc::corrupt, {"zstd stream"}));
}

TEST(Zstd, ABlockOfTheReservedTypeIsDamage) {
    const auto in = joined({frame_magic, window_descriptor(0), block_header(true, 3, 5), text_bytes("hello")});
    EXPECT_TRUE(fails(try_decompress(in, 5), Errc::corrupt, {"zstd stream"}));
}

TEST(Zstd, AChecksumThatDoesNotMatchIsDamage) {
    // The checksum is the last four bytes: the cluster is full before it is read.
    const auto spoilt = [](Bytes frame) {
        frame.back() ^= std::byte{1};
        return frame;
    };
    const auto frame = compressed(sample(65536), {.checksum = true});
    EXPECT_TRUE(fails(try_decompress(spoilt(frame), 65536), Errc::corrupt, {"zstd stream"}));
    const auto unsized = compressed(sample(65536), {.content_size = false, .checksum = true});
    EXPECT_TRUE(fails(try_decompress(spoilt(unsized), 65536), Errc::corrupt, {"zstd stream"}));
}

TEST(Zstd, DamageLeavesTheNextClusterAlone) {
    // The state that a thread keeps between clusters must not carry over.
    const auto frame = compressed(sample(65536), {.content_size = false});
    ASSERT_FALSE(try_decompress(first(frame, frame.size() / 2), 65536));
    EXPECT_EQ(decompressed(compressed(sample(512)), 512), sample(512));
    ASSERT_TRUE(try_decompress(frame, 1000));
    EXPECT_EQ(decompressed(frame, 65536), sample(65536));
}

// ---- Headers that claim too much ----

TEST(Zstd, AHugeWindowCostsNothingWhereTheFrameIsTheCluster) {
    // A window of 2 GiB, which a frame of five bytes does not use.
    const auto in = joined({frame_magic, window_descriptor(21), raw_block(true, text_bytes("hello"))});
    EXPECT_EQ(decompressed(in, 5), text_bytes("hello"));
}

TEST(Zstd, AHugeWindowIsRefusedWhereItWouldTakeMemory) {
    // The frame goes on after the cluster: it has to be decoded through its window.
    const auto in = joined({frame_magic, window_descriptor(21), raw_block(false, text_bytes("hello")),
                            raw_block(true, text_bytes("world"))});
    EXPECT_TRUE(fails(try_decompress(in, 5), Errc::corrupt, {"zstd stream"}));
}

TEST(Zstd, AWindowOfTwiceTheLargestClusterIsNotTooLarge) {
    // 4 MiB
    const auto in = joined({frame_magic, window_descriptor(12), raw_block(false, text_bytes("hello")),
                            raw_block(true, text_bytes("world"))});
    EXPECT_EQ(decompressed(in, 5), text_bytes("hello"));
}

TEST(Zstd, AWindowBeyondTheFormatsLimitIsDamage) {
    const auto in = joined({frame_magic, window_descriptor(31), raw_block(true, text_bytes("hello"))});
    EXPECT_TRUE(fails(try_decompress(in, 5), Errc::corrupt, {"zstd stream"}));
}

TEST(Zstd, AContentSizeThatTheFrameDoesNotHaveIsDamage) {
    // Eight bytes of content size, the least significant one first: 2^60, then 4.
    const auto huge = joined(
        {frame_magic, bytes({0xc0, 0x00}), bytes({0, 0, 0, 0, 0, 0, 0, 0x10}), raw_block(true, text_bytes("hello"))});
    EXPECT_TRUE(fails(try_decompress(huge, 5), Errc::corrupt, {"zstd stream"}));
    const auto small = joined(
        {frame_magic, bytes({0xc0, 0x00}), bytes({4, 0, 0, 0, 0, 0, 0, 0}), raw_block(true, text_bytes("hello"))});
    EXPECT_TRUE(fails(try_decompress(small, 5), Errc::corrupt, {"zstd stream"}));
}

TEST(Zstd, AHugeSingleSegmentIsRefused) {
    // Such a frame's window is its content size: 2^60 bytes.
    const auto in =
        joined({frame_magic, bytes({0xe0}), bytes({0, 0, 0, 0, 0, 0, 0, 0x10}), raw_block(true, text_bytes("hello"))});
    EXPECT_TRUE(fails(try_decompress(in, 5), Errc::corrupt, {"zstd stream"}));
}

TEST(Zstd, ClaimsDoNotTakeMemory) {
    // What the C library has handed out; a decoder keeps its window for the next frame.
    const auto in_use = [] { return mallinfo2().hblkhd + mallinfo2().uordblks; };
    const std::size_t before = in_use();
    for (std::uint8_t log = 0; log < 32; ++log) {
        const auto in = joined({frame_magic, window_descriptor(log), raw_block(false, repeated(1000, 0x61)),
                                raw_block(true, repeated(1000, 0x62))});
        Bytes out(1000);
        const bool decoded = decompress_zstd(in, out).has_value();
        EXPECT_TRUE(!decoded || out == repeated(1000, 0x61)) << unsigned{log};
    }
    EXPECT_LT(in_use(), before + (16 << 20));
}

TEST(Zstd, RunsOnSeveralThreadsAtOnce) {
    const auto frame = compressed(sample(65536));
    std::vector<Bytes> results(4);
    {
        std::vector<std::jthread> threads;
        for (auto& result : results)
            threads.emplace_back([&] {
                for (int i = 0; i < 20; ++i) result = decompressed(frame, 65536);
            });
    }
    for (const auto& result : results) EXPECT_EQ(result, sample(65536));
}

}  // namespace
}  // namespace qcow::codec
