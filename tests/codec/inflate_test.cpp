#include <gtest/gtest.h>
#include <zlib.h>

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

/// `in` as raw deflate, made by zlib. `window_bits`: 12 is what encoders of the format are to use. `flush` is Z_FINISH
/// for a whole stream, Z_SYNC_FLUSH for one that would go on.
Bytes deflated(const Bytes& in, int level = 6, int window_bits = 12, int flush = Z_FINISH) {
    z_stream stream = {};
    if (deflateInit2(&stream, level, Z_DEFLATED, -window_bits, 8, Z_DEFAULT_STRATEGY) != Z_OK)
        throw std::runtime_error("deflateInit2");
    Bytes out(deflateBound(&stream, in.size()) + 16);
    stream.next_in = const_cast<Bytef*>(reinterpret_cast<const Bytef*>(in.data()));
    stream.avail_in = static_cast<uInt>(in.size());
    stream.next_out = reinterpret_cast<Bytef*>(out.data());
    stream.avail_out = static_cast<uInt>(out.size());
    deflate(&stream, flush);
    out.resize(stream.total_out);
    deflateEnd(&stream);
    return out;
}

/// The first `size` bytes that the stream gives.
Bytes inflated(const Bytes& in, std::size_t size) {
    Bytes out = repeated(size, 0xee);
    must(inflate(in, out));
    return out;
}

Result<void> try_inflate(const Bytes& in, std::size_t size) {
    Bytes out(size);
    return inflate(in, out);
}

// ---- Literal streams ----

TEST(Inflate, AStoredBlock) {
    // Final, stored; length 5 and its complement; the bytes.
    const auto in = joined({bytes({0x01, 0x05, 0x00, 0xfa, 0xff}), text_bytes("hello")});
    EXPECT_EQ(inflated(in, 5), text_bytes("hello"));
}

TEST(Inflate, ABlockOfFixedCodes) { EXPECT_EQ(inflated(bytes({0x4b, 0x04, 0x00}), 1), text_bytes("a")); }

TEST(Inflate, AMatchThatOverlapsItself) {
    // "a", then 4 bytes from 1 byte before.
    EXPECT_EQ(inflated(bytes({0x4b, 0x04, 0x01, 0x00}), 5), text_bytes("aaaaa"));
}

// ---- Round trips ----

TEST(Inflate, UndoesDeflateForTheSmallestAndTheLargestClusters) {
    EXPECT_EQ(inflated(deflated(sample(512)), 512), sample(512));
    EXPECT_EQ(inflated(deflated(sample(65536)), 65536), sample(65536));
    EXPECT_EQ(inflated(deflated(sample(2 << 20)), 2 << 20), sample(2 << 20));
}

TEST(Inflate, UndoesDeflateAtEveryKindOfLevel) {
    EXPECT_EQ(inflated(deflated(sample(65536), 0), 65536), sample(65536));  // stored blocks
    EXPECT_EQ(inflated(deflated(sample(65536), 1), 65536), sample(65536));
    EXPECT_EQ(inflated(deflated(sample(65536), 9), 65536), sample(65536));
}

TEST(Inflate, UndoesDeflateOfZeros) { EXPECT_EQ(inflated(deflated(repeated(65536, 0)), 65536), repeated(65536, 0)); }

TEST(Inflate, TakesDistancesBeyond4KiBAsWell) {
    // Some encoders use the whole window of deflate.
    const auto data = joined({sample(20000, 1), sample(20000, 2), sample(20000, 1)});
    EXPECT_EQ(inflated(deflated(data, 9, 15), data.size()), data);
}

// ---- What follows the stream, and what there is too much of it ----

TEST(Inflate, IgnoresWhatFollowsTheStream) {
    const auto stream = deflated(sample(65536));
    EXPECT_EQ(inflated(joined({stream, repeated(511, 0xff)}), 65536), sample(65536));
    EXPECT_EQ(inflated(joined({stream, deflated(sample(65536, 9))}), 65536), sample(65536));
    EXPECT_EQ(inflated(joined({stream, repeated(1, 0)}), 65536), sample(65536));
}

TEST(Inflate, StopsWhenTheClusterIsFull) {
    const auto data = sample(2 * 65536);
    EXPECT_EQ(inflated(deflated(data), 65536), first(data, 65536));
    EXPECT_EQ(inflated(deflated(data), data.size() - 1), first(data, data.size() - 1));
    EXPECT_EQ(inflated(deflated(data, 0), 65536), first(data, 65536));
}

TEST(Inflate, StopsInTheMiddleOfAMatch) {
    EXPECT_EQ(inflated(deflated(repeated(65536, 0x61)), 1000), repeated(1000, 0x61));
}

TEST(Inflate, WritesNothingPastTheCluster) {
    Bytes out = repeated(1000 + 64, 0xee);
    must(inflate(deflated(repeated(65536, 0x61)), std::span(out).first(1000)));
    EXPECT_EQ(out, joined({repeated(1000, 0x61), repeated(64, 0xee)}));
}

// ---- Damage ----

TEST(Inflate, AStreamThatEndsEarlyIsDamaged) {
    EXPECT_TRUE(fails(try_inflate(deflated(sample(65535)), 65536), Errc::corrupt,
                      {"deflate stream: it ends before the cluster is full"}));
    EXPECT_TRUE(fails(try_inflate(deflated({}), 65536), Errc::corrupt, {"deflate stream"}));
}

TEST(Inflate, AStreamThatIsCutShortIsDamaged) {
    const auto stream = deflated(sample(65536));
    EXPECT_TRUE(fails(try_inflate(first(stream, stream.size() / 2), 65536), Errc::corrupt, {"deflate stream"}));
    EXPECT_TRUE(fails(try_inflate({}, 65536), Errc::corrupt, {"deflate stream"}));
}

TEST(Inflate, ABlockOfTheReservedTypeIsDamage) {
    EXPECT_TRUE(fails(try_inflate(bytes({0x07, 0x00, 0x00}), 512), Errc::corrupt, {"deflate stream"}));
    EXPECT_TRUE(fails(try_inflate(repeated(512, 0xff), 512), Errc::corrupt, {"deflate stream"}));
}

TEST(Inflate, AStoredBlockWhoseLengthIsContradictedIsDamaged) {
    const auto in = joined({bytes({0x01, 0x05, 0x00, 0xfa, 0xfe}), text_bytes("hello")});
    EXPECT_TRUE(fails(try_inflate(in, 5), Errc::corrupt, {"deflate stream"}));
}

TEST(Inflate, AMatchBeforeTheBeginningIsDamage) {
    // "a", then 4 bytes from 2 bytes before.
    EXPECT_TRUE(fails(try_inflate(bytes({0x4b, 0x04, 0x41, 0x00}), 5), Errc::corrupt, {"deflate stream"}));
}

TEST(Inflate, AZlibHeaderIsDamage) {
    const auto in = joined({bytes({0x78, 0x9c}), deflated(sample(512))});
    EXPECT_TRUE(fails(try_inflate(in, 512), Errc::corrupt, {"deflate stream"}));
}

TEST(Inflate, DamageLeavesTheNextClusterAlone) {
    // The state that a thread keeps between clusters must not carry over.
    ASSERT_FALSE(try_inflate(repeated(512, 0xff), 512));
    EXPECT_EQ(inflated(deflated(sample(512)), 512), sample(512));
}

TEST(Inflate, RunsOnSeveralThreadsAtOnce) {
    const auto stream = deflated(sample(65536));
    std::vector<Bytes> results(4);
    {
        std::vector<std::jthread> threads;
        for (auto& result : results)
            threads.emplace_back([&] {
                for (int i = 0; i < 20; ++i) result = inflated(stream, 65536);
            });
    }
    for (const auto& result : results) EXPECT_EQ(result, sample(65536));
}

// ---- What follows a full cluster does not matter ----

TEST(Inflate, AStreamThatIsCutOffBehindAFullCluster) {
    EXPECT_EQ(inflated(deflated(sample(65536), 6, 12, Z_SYNC_FLUSH), 65536), sample(65536));
}

TEST(Inflate, AStreamWhoseRestIsGarbage) {
    const auto stream = joined({deflated(sample(65536), 6, 12, Z_SYNC_FLUSH), repeated(100, 0xff)});
    EXPECT_EQ(inflated(stream, 65536), sample(65536));
}

}  // namespace
}  // namespace qcow::codec
