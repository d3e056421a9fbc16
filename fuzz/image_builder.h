#pragma once
// Images that are plausible enough to get deep: built whole from a seed, and damaged where it matters.

#include <cstdint>
#include <random>
#include <vector>

#include "fuzz/sparse_files.h"

namespace qcow::fuzz {

class Random {
public:
    explicit Random(std::uint64_t seed) : engine_(seed) {}
    std::uint64_t word() { return engine_(); }
    std::uint64_t below(std::uint64_t end) { return end == 0 ? 0 : engine_() % end; }
    bool chance(unsigned percent) { return below(100) < percent; }

private:
    std::mt19937_64 engine_;
};

/// A sound image of random geometry and contents, with the files that it names behind it.
std::vector<SparseFile> build_image(Random& random);

/// Overwrites a field, or an entry of a table, of one of the files with something that is likely to matter there.
void damage(std::vector<SparseFile>& files, Random& random);

}  // namespace qcow::fuzz
