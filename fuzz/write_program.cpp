#include "fuzz/write_program.h"

#include <algorithm>
#include <array>

#include "base/bits.h"
#include "base/endian.h"

namespace qcow::fuzz {
namespace {

constexpr unsigned units_of_place = 5;
constexpr unsigned units_of_length = 4;

std::uint64_t unit_bytes(unsigned unit, const Disk& disk) {
    const std::uint64_t cluster = disk.block_size();
    switch (unit) {
        case 0: return 1;
        case 1: return 512;
        case 2: return cluster;
        default: return std::min(cluster * cluster / 16, bit(40));
    }
}

Operation random_operation(Random& random) {
    using Verb = Operation::Verb;
    static constexpr std::array common = {
        Verb::write,       Verb::write,   Verb::write, Verb::write_scrambled,  Verb::write_compressed,
        Verb::zero,        Verb::discard, Verb::flush, Verb::write_compressed, Verb::discard,
        Verb::zero_keeping};
    Operation operation;
    operation.verb =
        random.chance(70) ? common[random.below(common.size())] : static_cast<Verb>(random.below(Operation::verbs));
    unsigned place = random.chance(60) ? 2 : static_cast<unsigned>(random.below(units_of_place));
    unsigned length = random.chance(60) ? 2 : static_cast<unsigned>(random.below(units_of_length));
    if (operation.verb == Verb::write_compressed && random.chance(90)) place = length = 2;
    operation.units = static_cast<std::uint8_t>(place | length << 4);
    operation.place = static_cast<std::uint32_t>(random.below(place == 0 ? 70'000 : place >= 3 ? 4 : 40));
    operation.length = static_cast<std::uint32_t>(random.below(length == 0 ? 70'000 : length == 3 ? 3 : 6));
    if (random.chance(5)) operation.place = static_cast<std::uint32_t>(random.word());
    if (random.chance(2)) operation.length = static_cast<std::uint32_t>(random.word());
    return operation;
}

}  // namespace

std::uint64_t Operation::place_on(const Disk& disk) const {
    const unsigned unit = (units & 15) % units_of_place;
    if (unit < 4) return place * unit_bytes(unit, disk);
    return disk.size() - std::min(disk.size(), place * disk.block_size());
}

std::uint64_t Operation::length_on(const Disk& disk) const {
    return length * unit_bytes((units >> 4) % units_of_length, disk);
}

WriteProgram WriteProgram::take(std::span<const std::byte>& input) {
    WriteProgram program;
    if (input.size() < 2) return program;
    program.options = static_cast<std::uint8_t>(input[0]);
    const auto count = static_cast<std::size_t>(input[1]);
    input = input.subspan(2);
    for (std::size_t i = 0; i < count && input.size() >= Operation::encoded_bytes; ++i) {
        const Operation operation{static_cast<Operation::Verb>(static_cast<unsigned>(input[0]) % Operation::verbs),
                                  static_cast<std::uint8_t>(input[1]), load_be<std::uint32_t>(input, 2),
                                  load_be<std::uint32_t>(input, 6)};
        if (i < max_operations) program.operations.push_back(operation);
        input = input.subspan(Operation::encoded_bytes);
    }
    return program;
}

std::vector<std::byte> WriteProgram::encode() const {
    std::vector<std::byte> out = {std::byte{options}, static_cast<std::byte>(operations.size())};
    for (const auto& operation : operations) {
        std::array<std::byte, Operation::encoded_bytes> bytes = {static_cast<std::byte>(operation.verb),
                                                                 std::byte{operation.units}};
        store_be(bytes, 2, operation.place);
        store_be(bytes, 6, operation.length);
        out.insert(out.end(), bytes.begin(), bytes.end());
    }
    return out;
}

WriteOptions WriteProgram::write_options() const {
    WriteOptions result;
    result.cache = static_cast<CacheMode>((options & 3) % 3);
    result.discard = (options & 4) == 0;
    result.detect_zeroes = static_cast<DetectZeroes>((options >> 3 & 3) % 3);
    return result;
}

WriteProgram build_program(Random& random) {
    WriteProgram program;
    program.options = random.chance(60) ? 0 : static_cast<std::uint8_t>(random.word());
    for (auto count = 1 + random.below(random.chance(70) ? 8 : WriteProgram::max_operations); count > 0; --count)
        program.operations.push_back(random_operation(random));
    return program;
}

void change(WriteProgram& program, Random& random) {
    auto& operations = program.operations;
    const auto place = [&] {
        return operations.begin() + static_cast<std::ptrdiff_t>(random.below(operations.size()));
    };
    const auto dice = random.below(10);
    if (dice == 0) {
        program.options = static_cast<std::uint8_t>(random.word());
    } else if (operations.empty() || (dice < 5 && operations.size() < WriteProgram::max_operations)) {
        operations.insert(operations.empty() ? operations.end() : place(), random_operation(random));
    } else if (dice < 7) {
        *place() = random_operation(random);
    } else if (dice < 8) {
        operations.erase(place());
    } else if (dice < 9) {
        std::iter_swap(place(), place());
    } else {
        auto& operation = *place();
        (random.chance(50) ? operation.place : operation.length) += static_cast<std::uint32_t>(random.below(5)) - 2;
    }
}

}  // namespace qcow::fuzz
