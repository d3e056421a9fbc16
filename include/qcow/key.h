#pragma once
// Keys of encrypted images: secrets, and the function that the library asks for them.

#include <cstddef>
#include <functional>
#include <span>
#include <string>

#include "qcow/error.h"
#include "qcow/export.h"

namespace qcow {

/// Secret bytes: a passphrase or a key. They lie in memory of their own, which is not swapped out (if the limit of
/// locked memory allows it), is not part of core dumps, and is wiped at the end. A Secret can be moved but not copied.
/// Nothing prints it.
///
/// Thread safety: as for a vector.
class QCOW_API Secret {
public:
    Secret() noexcept = default;
    /// Makes a secret of `size` zero bytes, to be filled through bytes().
    explicit Secret(std::size_t size);
    /// Copies `bytes`. The caller wipes its own copy.
    explicit Secret(std::span<const std::byte> bytes);
    Secret(Secret&& other) noexcept;
    Secret& operator=(Secret&& other) noexcept;
    ~Secret();

    [[nodiscard]] std::span<std::byte> bytes() noexcept { return {data_, size_}; }
    [[nodiscard]] std::span<const std::byte> bytes() const noexcept { return {data_, size_}; }

private:
    std::byte* data_ = nullptr;
    std::size_t size_ = 0;
};

/// Overwrites memory with zeros, also where the compiler sees no later use of it.
QCOW_API void wipe(std::span<std::byte> bytes) noexcept;

/// The image whose key is needed.
struct KeyRequest {
    std::string file;    ///< the name of the image's Storage
    std::string method;  ///< "luks" or "aes" (the legacy encryption of qcow and qcow2)
    /// Its place in the chain that is opened: 0 is the image that is opened, 1 its backing file, ... A job may open
    /// several chains, and counts from 0 in each: create() opens the backing file, rebase() the new backing file and
    /// then the image, commit() the image and then its base. `image` tells which chain it is.
    unsigned depth = 0;
    /// Location::secret of the name that leads to the image: a hint that nobody has to follow. Empty: there is none.
    std::string secret = {};
    std::string image = {};  ///< the name of the Storage at depth 0
};

/// Returns the key of an encrypted image: the passphrase, exactly as it is. Called while an image is opened, at most
/// once for each of its layers, and only after it is verified that the work which its header asks for is allowed. A job
/// that opens a layer twice asks twice. An error makes opening fail. Must not throw.
using KeySource = std::function<Result<Secret>(const KeyRequest&)>;

/// Bounds the time that the keys of an image and of all its layers may take, in seconds of one processor. The headers
/// of images say how much work it is. A header that asks for more is refused with Errc::limit_exceeded before anything
/// is computed.
inline constexpr double default_kdf_seconds = 60;

}  // namespace qcow
