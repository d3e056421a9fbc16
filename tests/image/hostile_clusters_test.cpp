// Damaged compressed clusters, and the old format.

#include <zlib.h>
#include <zstd.h>

#include <functional>

#include "codec/codec.h"
#include "fuzz/image_builder.h"
#include "hostile.h"
#include "qcow/copy.h"

namespace qcow::hostile {
namespace {

/// Four clusters of 64 KiB whose streams are all the same, but for what `damage` does to the third.
HostileImage compressed_image(const Bytes& stream, bool zstd, const std::function<void(HostileImage&)>& damage) {
    HostileImage image;
    image.zstd = zstd;
    image.size = 4 * 64 * KiB;
    image.file.write_word(image.cluster(3), image.cluster(4));
    const auto sectors = (stream.size() + 511) / 512;
    for (std::uint64_t i = 0; i < 4; ++i) {
        image.file.segments.push_back({image.cluster(5 + 2 * i), stream});
        image.file.write_word(image.cluster(4) + i * 8,
                              format::compressed_bit | (sectors - 1) << 54 | image.cluster(5 + 2 * i));
    }
    damage(image);
    return image;
}

Bytes text_cluster() {
    Bytes plain(64 * KiB);
    for (std::size_t i = 0; i < plain.size(); ++i)
        plain[i] = static_cast<std::byte>("compressible "[i % 13] + i / 4096);
    return plain;
}

Bytes deflated(const Bytes& plain) {
    z_stream stream = {};
    EXPECT_EQ(deflateInit2(&stream, 6, Z_DEFLATED, -12, 9, Z_DEFAULT_STRATEGY), Z_OK);
    Bytes out(plain.size() + 1024);
    stream.next_in = const_cast<Bytef*>(reinterpret_cast<const Bytef*>(plain.data()));
    stream.avail_in = static_cast<uInt>(plain.size());
    stream.next_out = reinterpret_cast<Bytef*>(out.data());
    stream.avail_out = static_cast<uInt>(out.size());
    EXPECT_EQ(deflate(&stream, Z_FINISH), Z_STREAM_END);
    out.resize(stream.total_out);
    deflateEnd(&stream);
    return out;
}

Bytes zstd_compressed(const Bytes& plain) {
    Bytes out(ZSTD_compressBound(plain.size()));
    out.resize(ZSTD_compress(out.data(), out.size(), plain.data(), plain.size(), 3));
    return out;
}

TEST_F(Hostile, ADamagedCompressedClusterHarmsNoOther) {
    const auto plain = text_cluster();
    for (const bool zstd : {false, true}) {
        auto image = compressed_image(zstd ? zstd_compressed(plain) : deflated(plain), zstd,
                                      [](HostileImage& i) { i.file.write(i.cluster(9), Bytes(64, std::byte{0xff})); });
        const auto opened = open_bounded(image.finish(16));
        ASSERT_TRUE(opened.has_value());
        Bytes bytes(plain.size());
        for (const std::uint64_t cluster : {0U, 1U, 3U, 2U, 0U}) {
            const auto read = (*opened)->read({cluster << 16}, bytes);
            if (cluster == 2) {
                expect_error(read, Errc::corrupt, {"guest offset 0x20000", "host offset 0x90000"});
            } else {
                ASSERT_TRUE(read.has_value()) << read.error().message();
                EXPECT_EQ(bytes, plain);
            }
        }
        Bytes all(4 * plain.size());
        expect_error((*opened)->read({0}, all), Errc::corrupt, {"guest offset 0x20000"});
        std::byte one = {};
        EXPECT_TRUE((*opened)->read({0x1ffff}, {&one, 1}).has_value());
        expect_error((*opened)->read({0x2ffff}, {&one, 1}), Errc::corrupt, {"host offset 0x90000"});
    }
}

TEST_F(Hostile, CompressedClustersThatLieElsewhere) {
    const auto plain = text_cluster();
    // Past the end, at the end of what can be addressed, in the header, with the longest length.
    for (const std::uint64_t word :
         {bit(40), low_bits(54), low_bits(62), std::uint64_t{0}, low_bits(62) & ~low_bits(54)}) {
        auto image = compressed_image(deflated(plain), false, [&](HostileImage& i) {
            i.file.write_word(i.cluster(4) + 16, format::compressed_bit | word);
        });
        const auto opened = open_bounded(image.finish(16));
        ASSERT_TRUE(opened.has_value());
        Bytes bytes(plain.size());
        expect_error((*opened)->read({0x20000}, bytes), Errc::corrupt, {"host offset 0x"});
        EXPECT_TRUE((*opened)->read({0x30000}, bytes).has_value());
        EXPECT_TRUE(check_bounded(**opened).has_value());
    }
}

TEST_F(Hostile, ZstdFrameThatClaimsFourGiB) {
    // A frame header with a content size of 2^32 + 5 bytes, in one segment and with a window of 2 GiB; then a block of
    // repeated bytes that never ends.
    for (const bool single_segment : {true, false}) {
        Bytes stream;
        append(stream, 0x28b52ffd, 4);
        append(stream, single_segment ? 0xe0 : 0xc0, 1);
        if (!single_segment) append(stream, 0xa8, 1);
        for (unsigned i = 0; i < 8; ++i) append(stream, std::uint64_t{0x1'0000'0005} >> (8 * i) & 0xff, 1);
        for (unsigned i = 0; i < 16; ++i) {
            const std::uint32_t block = 128 * 1024 << 3 | 1 << 1;  // 128 KiB of one byte, not the last
            for (unsigned b = 0; b < 3; ++b) append(stream, block >> (8 * b) & 0xff, 1);
            append(stream, 'z', 1);
        }
        auto image = compressed_image(stream, true, [](HostileImage&) {});
        const auto opened = open_bounded(image.finish(16));
        ASSERT_TRUE(opened.has_value());
        Bytes bytes(64 * KiB);
        Result<void> read;
        const auto cost = cost_of([&] { read = (*opened)->read({0}, bytes); });
        EXPECT_LT(cost.seconds, max_seconds);
        EXPECT_LT(cost.bytes, 64 * MiB * fatness);
        if (!read) expect_error(read, Errc::corrupt, {"host offset 0x50000"});
    }
}

/// Readers stop when the cluster is full, and do not care that a stream is cut off behind that point.
TEST_F(Hostile, DeflateStreamCutOffBehindAFullCluster) {
    const Bytes stream = {std::byte{0x3a}, std::byte{0}, std::byte{0}};
    Bytes out(1);
    EXPECT_TRUE(codec::inflate(stream, out).has_value());
    EXPECT_FALSE(codec::inflate(Bytes{}, out).has_value());
}

/// Old images have no limit of sectors: every table and every stream may lie at any byte.
TEST_F(Hostile, OldFormatEntriesThatLeadAstray) {
    for (const std::uint64_t l2 :
         {std::uint64_t{1}, ~std::uint64_t{0}, ~std::uint64_t{7}, bit(63), bit(56) - 1, std::uint64_t{4090}}) {
        for (const std::uint64_t entry : {~std::uint64_t{0}, bit(63), bit(63) | 4095, bit(63) - 1, std::uint64_t{1}}) {
            fuzz::SparseFile file;
            Bytes h;
            append(h, format::magic, 4);
            append(h, 1, 4);
            h.resize(24);
            append(h, 64 * KiB, 8);
            append(h, 12, 1);
            append(h, 9, 1);
            append(h, 0, 6);
            append(h, 48, 8);
            append(h, l2, 8);
            file.write(0, h);
            file.write_word(l2 % 4096 + 64, entry);
            file.write_word(4090, entry);
            file.fixed_size = l2 == bit(56) - 1 ? bit(62) : 8192;
            const auto opened = open_image(fuzz::storage_of(file, "old"));
            ASSERT_TRUE(opened.has_value());
            Bytes bytes(64 * KiB);
            if (const auto read = (*opened)->read({0}, bytes); !read) expect_error(read, Errc::corrupt, {"0x"});
            if (const auto usage = measure_usage(**opened); !usage) expect_good_message(usage.error());
        }
    }
}

TEST_F(Hostile, OldFormatWithManyCompressedClusters) {
    fuzz::SparseFile file;
    Bytes h;
    append(h, format::magic, 4);
    append(h, 1, 4);
    h.resize(24);
    append(h, 4 * MiB, 8);
    append(h, 9, 1);
    append(h, 13, 1);
    append(h, 0, 6);
    append(h, 48, 8);
    append(h, 1024, 8);
    file.write(0, h);
    const auto stream = deflated(Bytes(512));
    Bytes table;
    for (unsigned i = 0; i < 8192; ++i) append(table, bit(63) | std::uint64_t{stream.size()} << 54 | 512, 8);
    file.segments.push_back({1024, table});
    file.segments.push_back({512, stream});
    write("image", file);
    const auto opened = open_image(open("image"));
    ASSERT_TRUE(opened.has_value());
    Bytes bytes(4 * MiB);
    Result<void> read;
    const auto cost = cost_of([&] { read = (*opened)->read({0}, bytes); });
    EXPECT_TRUE(read.has_value());
    EXPECT_LT(cost.seconds, max_seconds);
}

}  // namespace
}  // namespace qcow::hostile
