#pragma once
// What a fuzzed guest does to its disk, as the front of an input:
//
//   u8 options    how the image is opened for writing: see WriteProgram::options
//   u8 count      of the operations; at most max_operations are done
//   count times   u8 verb, u8 units, u32 place, u32 length
//   the files, as in sparse_files.h
//
// Numbers are big-endian. Whatever is missing at the end is not done.

#include <cstdint>
#include <span>
#include <vector>

#include "fuzz/image_builder.h"
#include "qcow/image.h"

namespace qcow::fuzz {

struct Operation {
    enum class Verb : std::uint8_t {
        write,
        write_scrambled,  ///< bytes that cannot be compressed
        write_zero_bytes,
        write_compressed,
        zero,
        zero_keeping,
        discard,
        read,
        flush,
        resize,
        check,
        reopen,
        snapshot,  ///< makes, applies or removes one
        bitmap,    ///< adds, removes or changes one
        empty,
        repair,  ///< of the closed file, like what follows
        compact,
        amend,
    };
    static constexpr unsigned verbs = 18;

    Verb verb = Verb::write;
    std::uint8_t units = 0;  ///< low half: of the place, high half: of the length
    std::uint32_t place = 0;
    std::uint32_t length = 0;

    static constexpr std::size_t encoded_bytes = 10;

    /// Units are bytes, sectors, clusters, and halves of what an L2 table maps; a place may also be counted back from
    /// the end of the disk.
    [[nodiscard]] std::uint64_t place_on(const Disk& disk) const;
    [[nodiscard]] std::uint64_t length_on(const Disk& disk) const;
};

struct WriteProgram {
    static constexpr std::size_t max_operations = 40;

    std::uint8_t options = 0;
    std::vector<Operation> operations;

    /// Takes it off the front of the input.
    static WriteProgram take(std::span<const std::byte>& input);
    [[nodiscard]] std::vector<std::byte> encode() const;
    [[nodiscard]] WriteOptions write_options() const;
};

WriteProgram build_program(Random& random);

/// Changes, adds, removes or moves an operation.
void change(WriteProgram& program, Random& random);

}  // namespace qcow::fuzz
