#pragma once
// Which images the matrix is made of.

#include <fmt/format.h>

#include <array>
#include <ostream>

#include "interop/image_maker.h"

namespace qcow::test {

std::string size_name(unsigned bits);

std::string codec_name(Codec codec);

inline constexpr std::array codecs = {Codec::none, Codec::zlib, Codec::zstd};
inline constexpr std::array namings = {Naming::relative,    Naming::absolute,    Naming::from_subdirectory,
                                       Naming::file_scheme, Naming::json_nested, Naming::json_flat};

/// How gtest prints one.
inline void PrintTo(const ImageSpec& spec, std::ostream* out) { *out << spec.name; }

class Cases {
public:
    std::vector<ImageSpec> all();

private:
    void add(ImageSpec spec, std::string name);

    void add_layer(LayerSpec layer, std::string name) { add({.layers = {std::move(layer)}}, std::move(name)); }

    void cluster_sizes();

    void refcount_widths();

    void extended_l2();

    void data_files();

    void backing_chains();

    static std::uint64_t layer_size(const std::string& length, std::size_t i);

    void snapshots();

    void preallocation();

    void features();

    void version_1();

    void sizes();

    void mixtures();

    std::vector<ImageSpec> cases_;
};

/// Fills in what a "mixture" is: anything that goes together, other with each seed.
ImageSpec mixed(ImageSpec spec);

}  // namespace qcow::test
