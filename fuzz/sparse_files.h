#pragma once
// How one input of the fuzzer describes a few files, which may be sparse and far larger than the input: a short input
// can then hold an image with clusters of 2 MiB, or one of 2^62 bytes.
//
// An input is a sequence of records, each begun by a byte whose low two bits say what it is:
//   0  u64 offset, u16 length, bytes            the file has these bytes there
//   1  u64 size                                 the file's length; without it, the end of its last bytes
//   2                                           the next file begins
//   3  u64 offset, u16 length, u16 count, bytes the bytes, `count` times
// All numbers are big-endian. Later bytes replace earlier ones. Whatever does not fit is cut off, so that every input
// means something.

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "qcow/storage.h"

namespace qcow::fuzz {

struct SparseFile {
    struct Segment {
        std::uint64_t offset = 0;
        std::vector<std::byte> bytes;
    };
    std::vector<Segment> segments;
    std::optional<std::uint64_t> fixed_size;

    [[nodiscard]] std::uint64_t size() const;
    void read(std::uint64_t at, std::span<std::byte> to) const;
    [[nodiscard]] std::uint64_t word(std::uint64_t at) const;
    [[nodiscard]] std::uint32_t half_word(std::uint64_t at) const;
    /// Changes a segment where there is one that has the place, else adds one.
    void write(std::uint64_t at, std::span<const std::byte> bytes);
    void write_word(std::uint64_t at, std::uint64_t value);
    void write_half_word(std::uint64_t at, std::uint32_t value);
};

std::vector<SparseFile> parse_files(std::span<const std::byte> input);
std::vector<std::byte> encode_files(std::span<const SparseFile> files);

/// In memory where it is small, else with holes. Read-only.
std::shared_ptr<Storage> storage_of(SparseFile file, std::string name);

}  // namespace qcow::fuzz
