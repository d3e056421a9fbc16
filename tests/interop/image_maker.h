#pragma once
// Images made by QEMU's own tools, of every kind and with random contents.

#include <algorithm>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <string>
#include <vector>

#include "support/qemu.h"
#include "support/random.h"
#include "support/temporary_directory.h"

namespace qcow::test {

enum class Codec { none, zlib, zstd };
enum class DataFile { none, plain, raw };

/// How an image names the one below it.
enum class Naming { relative, absolute, from_subdirectory, file_scheme, json_nested, json_flat };

struct LayerSpec {
    std::string format = "qcow2";  // or "qcow", "raw"
    unsigned version = 3;
    unsigned cluster_bits = 16;
    unsigned refcount_bits = 16;
    Codec codec = Codec::none;  // none: nothing is written compressed
    bool extended_l2 = false;
    DataFile data_file = DataFile::none;
    bool lazy_refcounts = false;
    std::string preallocation = {};
    Naming naming = Naming::relative;
    std::uint64_t size = 0;  // virtual, bytes; 0: some clusters, and a tail that fills no cluster
    bool written = true;     // false: left as it is created

    [[nodiscard]] std::uint64_t cluster_size() const { return std::uint64_t{1} << cluster_bits; }
};

/// An image and what lies below it.
struct ImageSpec {
    std::string name = {};
    std::vector<LayerSpec> layers = {{}};  // from the bottom up
    unsigned snapshots = 0;                // of the top layer, each after further writes
    bool resized = false;                  // the top layer, between the snapshots
    bool vm_state = false;                 // bytes behind the end of the virtual disk
    bool bitmaps = false;
    bool crashed = false;  // the last writer was killed

    LayerSpec& top() { return layers.back(); }
    [[nodiscard]] const LayerSpec& top() const { return layers.back(); }
};

/// Makes one image, with all that it needs, in a directory of its own.
class ImageMaker {
public:
    explicit ImageMaker(ImageSpec spec);

    [[nodiscard]] const ImageSpec& spec() const { return spec_; }
    [[nodiscard]] const TemporaryDirectory& directory() const { return directory_; }
    [[nodiscard]] std::string file(std::size_t layer) const { return directory_.file(name_of(layer)); }
    [[nodiscard]] std::string top() const { return file(spec_.layers.size() - 1); }
    [[nodiscard]] const std::vector<std::string>& snapshots() const { return snapshots_; }
    [[nodiscard]] Random& random() { return random_; }

private:
    static constexpr std::uint64_t sector = 512;

    std::uint64_t usual_size(const LayerSpec& layer);

    /// Relative to directory_, which is also where QEMU's tools run.
    [[nodiscard]] std::string name_of(std::size_t i) const;

    /// The name under which layer i finds layer i - 1.
    [[nodiscard]] std::string backing_name(std::size_t i) const;

    /// QEMU looks for it from where it runs, so that only the root has relative names.
    [[nodiscard]] std::string data_file_name(std::size_t i) const;

    [[nodiscard]] std::string options_of(std::size_t i) const;

    void create(std::size_t i);

    /// Compressed clusters first and in a session of their own: QEMU 7.2 can put them where it also puts others if
    /// the same process frees clusters meanwhile.
    void fill(std::size_t i);

    void fill_top();

    void resize_top();

    void crash_top();

    struct Range {
        std::uint64_t at;
        std::uint64_t length;
    };

    Range random_range(const LayerSpec& layer);

    /// Whole clusters where nothing has been stored, which is where QEMU writes compressed ones.
    std::vector<std::string> compressed_writes(const LayerSpec& layer);

    /// Writes that overlap, zeros, discards.
    std::vector<std::string> session(const LayerSpec& layer);

    /// Gives the option for what to write: a byte, or a new random file again and again.
    std::function<std::string()> contents_for(const LayerSpec& layer);

    static std::string place(const Range& range);

    void write_pattern(const std::string& path, std::uint64_t cluster);

    ImageSpec spec_;
    Random random_;
    TemporaryDirectory directory_;
    std::vector<std::string> snapshots_;
    unsigned patterns_ = 0;
    std::vector<bool> stored_;  // the clusters of the layer at hand that may have been written
};

}  // namespace qcow::test
