#pragma once
// Errors are values. Every function that can fail returns a Result, and throws no exception: also where memory runs out
// (Errc::no_memory). Functions that the caller passes in must not throw either. What returns a plain text or object
// (such as printable, Error::message, memory_storage, local_files) throws std::bad_alloc where there is no memory for
// that.

#include <expected>
#include <string>
#include <string_view>
#include <utility>

#include "qcow/export.h"
#include "qcow/offset.h"

namespace qcow {

/// What kind of failure it is, for programs; people read Error::message().
enum class Errc {
    invalid_argument,   ///< the caller asked for something that cannot be
    not_found,          ///< no such file or snapshot
    access_denied,      ///< the operating system forbids it
    locked,             ///< another process holds the file in a way that excludes this use
    read_only,          ///< a write to something that was opened for reading
    no_space,           ///< the file system or quota is full
    io,                 ///< the operating system failed a read, write or flush
    corrupt,            ///< the image contradicts its format
    unsupported,        ///< a valid image that uses something this library does not do
    encrypted,          ///< the data is encrypted and no key was given
    refused_by_policy,  ///< the image names a file that the caller's policy does not let it open
    limit_exceeded,     ///< a limit on memory, depth or size that the caller or the library set
    no_memory,          ///< the system gave no memory; an image that was being changed is no longer written
    cancelled,          ///< the caller stopped the job: see JobControl::stop
};

/// One failure: its kind, the place where it was found, and a sentence to act on.
struct QCOW_API Error {
    Errc code = Errc::io;
    std::string place;  ///< file, structure and offset, outermost first, joined by ": "
    std::string what;   ///< what is wrong there and, where there is one, the remedy

    /// Of Disk::read and Disk::extent: the bytes of the request that cannot be read for this reason. All before them
    /// can be read. Length 0: which bytes they are is not known.
    GuestRange unreadable = {};

    /// "place: what", on one line whatever the image's own strings contain.
    [[nodiscard]] std::string message() const;

    /// The same error seen from further out: `outer` is put in front of the place.
    [[nodiscard]] Error in(std::string_view outer) &&;
};

template <class T>
using Result = std::expected<T, Error>;

}  // namespace qcow
