#pragma once
// An image whose header has been read and verified, but whose neighbours (backing file, data file) are not there yet.
// Each format offers one function that gives it; whoever opens chains knows nothing else of formats.

#include <cstddef>
#include <memory>
#include <optional>
#include <string>

#include "disk/layer.h"

namespace qcow {

class PendingImage {
public:
    PendingImage() = default;
    PendingImage(const PendingImage&) = delete;
    PendingImage& operator=(const PendingImage&) = delete;
    virtual ~PendingImage() = default;

    /// The name of the backing file, as the header has it, and its format where that is recorded.
    struct Backing {
        std::string name;
        std::optional<std::string> format;
    };
    [[nodiscard]] virtual std::optional<Backing> backing() const { return std::nullopt; }

    /// The name of the external data file.
    [[nodiscard]] virtual std::optional<std::string> data_file() const { return std::nullopt; }

    /// The method of the encryption, as KeyRequest::method.
    [[nodiscard]] virtual std::optional<std::string> encryption() const { return std::nullopt; }

    /// The seconds of one processor that trying a key takes at most, as the header asks for it. Errors: Errc::corrupt,
    /// unsupported, limit_exceeded; io.
    [[nodiscard]] virtual Result<double> key_seconds() const { return 0.0; }

    /// What the image is to work with. Absent neighbours that the header names make reads of what they hold fail.
    struct Neighbours {
        std::shared_ptr<Layer> backing;
        bool alone = false;  // there is no backing file, whatever the header says
        std::shared_ptr<Storage> data_file;
        std::size_t cache_bytes = 0;
        std::optional<WriteOptions> write = {};  // nothing: read-only
        std::optional<Secret> key = {};          // nothing: the image can only be examined
        double max_kdf_seconds = default_kdf_seconds;
    };
    virtual Result<std::shared_ptr<Layer>> open(Neighbours neighbours) = 0;
};

}  // namespace qcow
